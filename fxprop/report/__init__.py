"""A plan to numbers, and numbers to text, pages and pictures."""

"""From a plan to numbers, and from numbers to text."""

"""A layer and what lies behind it, with one backward: the table of regions, and an operator for each."""

"""The forms of the report: each a few functions of its data."""

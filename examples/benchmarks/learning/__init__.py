"""Parts of equal_time.py."""

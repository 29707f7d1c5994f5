"""Looking at what was done: code before and after, one layer explained, all of it in a folder."""

"""Looking at a rewrite: code before and after, one layer explained, all of it in a folder."""

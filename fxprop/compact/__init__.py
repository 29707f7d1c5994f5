"""A backward that runs on part of the mini-batch: which examples, and a backward graph that takes them."""

"""The module that holds traced graphs in the place of a model's own code."""

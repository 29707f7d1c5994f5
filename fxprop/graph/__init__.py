"""From a graph to its sites, and from a plan to the rewritten graph."""

"""From a model to a graph with shapes; knows nothing of sparsity."""

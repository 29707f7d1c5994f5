"""A model to graphs, and to a run of it that shows shapes; knows nothing of sparsity."""

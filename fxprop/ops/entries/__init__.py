"""The backward of kept entries alone, computed sparsely by compiled loops on the CPU."""

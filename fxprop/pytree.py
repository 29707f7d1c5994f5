"""What models take and return: tensors in nested tuples, lists, dictionaries and registered classes.

torch has no public functions for these; this file alone imports the private ones.
"""

from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["tree_leaves", "tree_map"]

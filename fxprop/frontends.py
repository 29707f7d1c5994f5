"""What files of fxprop 0.1 name. They hold classes that are no more; this says so in place of a lookup."""

raise ImportError(
    "this file holds a module that fxprop 0.1 transformed, and later versions cannot load it. Load it with "
    "fxprop 0.1, save `fxprop.restore(gm).state_dict()`, and transform the model again"
)

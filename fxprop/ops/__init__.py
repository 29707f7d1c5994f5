"""Operators with a sparse backward: the functions that appear in transformed graphs.

Tensors in, tensors out; nothing here knows about graphs.
"""

from fxprop.ops.conv import conv1d, conv2d, conv3d
from fxprop.ops.linear import linear
from fxprop.ops.select import register_score, score_names

__all__ = ["conv1d", "conv2d", "conv3d", "linear", "register_score", "score_names"]

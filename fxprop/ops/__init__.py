"""Operators with a sparse backward: the functions that appear in transformed graphs.

Tensors in, tensors out; nothing here knows about graphs.
"""

from fxprop.ops.attention import attention, check_same, restore_layout, sequence_first, unpack
from fxprop.ops.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from fxprop.ops.grouped_mm import grouped_mm
from fxprop.ops.linear import linear
from fxprop.ops.products import addmm, einsum, matmul
from fxprop.ops.reads import Product
from fxprop.ops.regions.conv_batch_norm import conv_batch_norm
from fxprop.ops.regions.conv_group_norm import conv_group_norm
from fxprop.ops.regions.linear_activation import linear_activation
from fxprop.ops.scores import register_score, score_names

__all__ = [
    "Product",
    "addmm",
    "attention",
    "check_same",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_batch_norm",
    "conv_group_norm",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "einsum",
    "grouped_mm",
    "linear",
    "linear_activation",
    "matmul",
    "register_score",
    "restore_layout",
    "score_names",
    "sequence_first",
    "unpack",
]

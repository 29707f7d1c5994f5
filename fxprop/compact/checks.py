"""Operators of aten, and what must hold of where their arguments have the examples to keep these apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from fxprop.compact.flattened import size_of
from fxprop.compact.follow import Examples, agreed, name_of, tensors_in, value_of

# (node, its arguments by name, the places of the examples) -> why it joins them; None if it does not
Check = Callable[[fx.Node, dict[str, Any], Examples], str | None]

# what makes something of all examples that is no sum: fit to choose by, and not for a gradient
RANKING = ("mean", "amax", "amin", "linalg_vector_norm", "norm", "var", "var_mean", "logsumexp", "prod")


def check_pointwise(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    value = node.meta["val"]
    rank = (value[0] if isinstance(value, list | tuple) else value).dim()
    own = examples.at(node)
    if any(examples.has(value_of(argument)) for argument in _values(given)):
        return "it computes with the number of examples"
    for tensor in tensors_in(list(given.values())):
        rows = examples.at(tensor)
        if rows is None:
            continue
        here = replace(rows, dim=rows.dim + rank - tensor.meta["val"].dim())
        if own is None or agreed((here, own)) != {own}:
            return "it pairs each example with others"
    return None


def _values(given: dict[str, Any]) -> list[Any]:
    return [
        v for name, v in given.items() if name not in ("size", "memory_format", "dtype", "layout", "device")
    ]


def _same(*names: str, dims: tuple[int, ...] = ()) -> Check:
    """The tensors `names` and what is computed have the examples in one place, which is none of `dims`."""

    def check(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
        places = set()
        for name in names:
            if given.get(name) is not None:
                rows = examples.at(given[name])
                if rows is None:
                    return f"{name} has no examples"
                if rows.dim - given[name].meta["val"].dim() in dims:
                    return f"it works along the examples of {name}"
                places.add(rows)
        return None if len(agreed(places)) == 1 else "its tensors have the examples in different places"

    return check


def _along(tensor: str, dims: str) -> Check:
    """It works along the dimensions `dims` of `tensor`, which must not have the examples."""

    def check(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
        rows = examples.at(given[tensor])
        if rows is None:
            return "it puts examples where there were none"
        rank = given[tensor].meta["val"].dim()
        along = given.get(dims)
        every = [along] if isinstance(along, int) else list(along or range(rank))
        return "it works along the examples" if rows.dim in [d % rank for d in every] else None

    return check


def _sums(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    return None  # what becomes of a sum is asked elsewhere


def _unreduced(check: Check) -> Check:
    """The backward of a loss, which is one number for each entry if nothing was summed."""

    def check_unreduced(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
        reduced = "it computes with the number of examples"
        return reduced if given["reduction"] != 0 else check(node, given, examples)

    return check_unreduced


def _shaped(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    return None if examples.at(node) is not None else "it picks some of the examples"


def _all_aligned(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    """What is put together has the examples in the same dimension."""
    dim = given["dim"]
    own = examples.at(node)
    rank = node.meta["val"].dim()
    places = {examples.at(tensor) for tensor in tensors_in(given["tensors"])}
    if name_of(node) == "aten.stack":
        return None if own is not None and None not in places else "only some of its tensors have examples"
    if None in places or own is None:
        return "only some of its tensors have examples"
    if own.dim == dim % rank:
        return None  # behind each other, as `flattened` follows them
    return None if places == {own} else "its tensors have the examples in different places"


def _product(left: str, right: str) -> Check:
    """A matrix product: examples in rows, columns or the batch of matrices, or summed over in both."""

    def check(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
        a, b = examples.at(given[left]), examples.at(given[right])
        rank = given[left].meta["val"].dim()
        sums_a = a is not None and a.dim == rank - 1
        sums_b = b is not None and b.dim == given[right].meta["val"].dim() - 2 and (rank > 1)
        if sums_a or sums_b:
            same = a is not None and b is not None and (a.outer, a.inner) == (b.outer, b.inner)
            return None if sums_a and sums_b and same else "it sums over the examples of one factor alone"
        if a is not None and b is not None and (a, rank) != (b, 3):
            return "it multiplies each example by others"
        own, added = examples.at(node), None if left == "self" else examples.at(given["self"])
        if added is not None and own is not None and (added.outer, added.inner) != (own.outer, own.inner):
            return "it pairs each example with others"
        return None

    return check


def _convolution(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    if examples.at(given["weight"]) is not None:
        return "its weight differs from example to example"
    for name in ("grad_output", "input"):
        rows = examples.at(given[name])
        if rows is None or rows.dim != 0:
            return f"{name} has the examples in another dimension than the first"
    a, b = examples.at(given["grad_output"]), examples.at(given["input"])
    return None if a == b else "its tensors have the examples in different places"


def _convolved(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    rows = examples.at(given["input"])
    if rows is None or rows.dim != 0 or examples.at(given["weight"]) is not None:
        return "its weight differs from example to example"
    return None


def _layer_norm(*names: str) -> Check:
    """As `_same`; the dimensions that are normalized must not have the examples."""

    def check(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
        normed = tuple(range(-len(given["normalized_shape"]), 0))
        return _same(*names, dims=normed)(node, given, examples)

    return check


def _index(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    rows = examples.at(given["self"])
    if rows is None:
        return (
            None if examples.at(node) is not None else "it picks some of the examples"
        )  # a table, looked up
    if given["indices"][rows.dim : rows.dim + 1] not in ([], [None]):
        return "it picks among the examples"
    if any(examples.at(index) is not None for index in tensors_in(given["indices"])):
        return "it pairs each example with others"
    return None


def _index_put(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    rows = examples.at(given["self"])
    if rows is None and given.get("accumulate", True):
        # an embedding's gradient: rows added where each example says
        places = {
            (r.outer, r.inner)
            for t in tensors_in([given["indices"], given["values"]])
            if (r := examples.at(t))
        }
        return None if len(places) == 1 else "its tensors have the examples in different places"
    if rows is None:
        return "examples write over each other"
    return _index(node, given, examples)


def _padded(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    rows = examples.at(given["self"])
    if rows is None or rows != examples.at(node):
        return "it picks some of the examples"
    behind = given["self"].meta["val"].dim() - 1 - rows.dim
    return "it works along the examples" if any(given["pad"][2 * behind : 2 * behind + 2]) else None


def _written(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    """Part of a tensor is replaced; of the examples all, in their order."""
    rows, src = examples.at(given["self"]), examples.at(given["src"])
    if rows is None or src is None or len(agreed((rows, src))) != 1:
        return "its tensors have the examples in different places"
    sizes = [given[name].meta["val"].shape[rows.dim] for name in ("self", "src")]
    return None if size_of(sizes[0]) == size_of(sizes[1]) else "it picks some of the examples"


def _gathered(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    """Along `dim` each example is looked up, or written, by its own indices."""
    rank = given["index"].meta["val"].dim()
    found = [examples.at(t) for t in tensors_in([given["self"], given["index"], given.get("src")])]
    places = agreed(rows for rows in found if rows is not None)
    if len(places) != 1 or None in found:
        return "its tensors have the examples in different places"
    return "it works along the examples" if places.pop().dim == given["dim"] % rank else None


def _embedding_backward(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    if examples.has(value_of(given["num_weights"])):
        return "its table differs from example to example"
    if given.get("scale_grad_by_freq"):
        return "scale_grad_by_freq counts over all examples"
    return _same("grad_output", "indices")(node, given, examples)


def _constructed(node: fx.Node, given: dict[str, Any], examples: Examples) -> str | None:
    return None  # of a tensor it reads shape and dtype alone


_BY_CHECK: tuple[tuple[Check, str], ...] = (
    (
        _shaped,
        "view _unsafe_view reshape _reshape_alias permute transpose t numpy_T unsqueeze squeeze expand "
        "alias detach clone contiguous _to_copy to lift_fresh_copy split split_with_sizes unbind diagonal "
        "slice slice_backward select_backward diagonal_backward repeat as_strided "
        "as_strided_scatter",
    ),
    (
        check_pointwise,
        "native_dropout_backward threshold_backward gelu_backward copy masked_fill where "
        "_prelu_kernel_backward elu_backward hardsigmoid_backward hardswish_backward hardtanh_backward "
        "leaky_relu_backward log_sigmoid_backward logit_backward mish_backward rrelu_with_noise_backward "
        "sigmoid_backward silu_backward softplus_backward tanh_backward _prelu_kernel hardswish mish "
        "leaky_relu elu hardtanh softplus silu gelu relu6 selu celu logsigmoid",
    ),
    (
        _unreduced(check_pointwise),
        "mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward "
        "soft_margin_loss_backward",
    ),
    (_unreduced(_same("grad_output", "self", "target")), "nll_loss_backward nll_loss2d_backward"),
    (_sums, "sum sum_to_size " + " ".join(RANKING)),
    (
        _along("self", "dim"),
        "cumsum cumprod sort topk kthvalue median mode max min argmax argmin any all std std_mean _softmax "
        "_log_softmax index_select index_add index_copy index_fill select select_scatter glu",
    ),
    (_padded, "constant_pad_nd"),
    (_written, "slice_scatter"),
    (_along("self", "dims"), "roll flip"),
    (_along("grad_output", "dim"), "glu_backward"),
    (_along("self", "dimension"), "unfold"),
    (_along("grad_in", "dim"), "unfold_backward"),
    (_along("grad_output", "dim"), "_softmax_backward_data _log_softmax_backward_data"),
    (_all_aligned, "cat stack"),
    (_product("self", "mat2"), "mm bmm"),
    (_product("mat1", "mat2"), "addmm"),
    (_product("batch1", "batch2"), "baddbmm"),
    (_product("self", "vec"), "mv"),
    (_product("self", "tensor"), "dot"),
    (_convolution, "convolution_backward"),
    # recomputed in the backward, inside of a checkpoint
    (_convolved, "convolution"),
    (_layer_norm("input"), "native_layer_norm _fused_rms_norm"),
    (_same("input", dims=(-1,)), "native_group_norm"),
    (_same("indices"), "embedding"),
    (_same("self", dims=(-1,)), "avg_pool1d reflection_pad1d replication_pad1d"),
    (
        _same("self", dims=(-1, -2)),
        "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d reflection_pad2d "
        "replication_pad2d upsample_bilinear2d upsample_bicubic2d upsample_nearest2d",
    ),
    (_same("self", dims=(-1, -2, -3)), "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d"),
    (
        _same("query", "key", "value", dims=(-1, -2)),
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention",
    ),
    (_layer_norm("grad_out", "input"), "native_layer_norm_backward _fused_rms_norm_backward"),
    (_same("grad_out", "input", "mean", "rstd", dims=(-1,)), "native_group_norm_backward"),
    (_embedding_backward, "embedding_dense_backward"),
    (_index, "index _unsafe_index _unsafe_masked_index"),
    (_index_put, "index_put _unsafe_index_put _unsafe_masked_index_put_accumulate"),
    (_gathered, "gather scatter scatter_add"),
    (
        _same("grad_output", "self", dims=(-1, -2)),
        "max_pool2d_with_indices_backward avg_pool2d_backward _adaptive_avg_pool2d_backward "
        "adaptive_max_pool2d_backward reflection_pad2d_backward replication_pad2d_backward",
    ),
    (_same("grad_output", "self", dims=(-1,)), "reflection_pad1d_backward replication_pad1d_backward"),
    (
        _same("grad_output", "self", dims=(-1, -2, -3)),
        "max_pool3d_with_indices_backward avg_pool3d_backward _adaptive_avg_pool3d_backward "
        "adaptive_max_pool3d_backward reflection_pad3d_backward replication_pad3d_backward",
    ),
    (
        _same("grad_output", dims=(-1, -2)),
        "upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_nearest2d_backward "
        "_upsample_bilinear2d_aa_backward _upsample_nearest_exact2d_backward",
    ),
    (_same("self", dims=(-1, -2)), "im2col col2im"),
    (_same("self", dims=(-1, -2, -3)), "pixel_shuffle pixel_unshuffle"),
    (_same("grad_output", "input", dims=(-1, -2, -3)), "grid_sampler_2d_backward"),
    (_same("input", "grid", dims=(-1,)), "grid_sampler_2d"),
    (
        _constructed,
        "zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty new_empty_strided",
    ),
    (
        _same("grad_out", "query", "key", "value", "out", "logsumexp", dims=(-1, -2)),
        "_scaled_dot_product_flash_attention_for_cpu_backward _scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_cudnn_attention_backward",
    ),
    (
        _same("grad_out_", "query", "key", "value", "out", "logsumexp", dims=(-1, -2)),
        "_scaled_dot_product_efficient_attention_backward",
    ),
)
CHECKS = {f"aten.{name}": check for check, names in _BY_CHECK for name in names.split()}
CHECKS["prims.convert_element_type"] = _shaped
CHECKS["prims._low_memory_max_pool_offsets_to_indices"] = _same("self", dims=(-1, -2))

"""Multi-head attention without its projections: what lies between in_proj and out_proj.

These functions and ordinary linear layers together are `torch.nn.functional.multi_head_attention_forward`
(torch 2.15), step by step, so that the result is the same to the bit. They have no sparse backward: they
keep the shape checks and mask handling out of the graph, so that the projections can be seen in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxprop.errors import InputError
from fxprop.ops.calling import public


@public
def sequence_first(input: Tensor, batch_first: bool) -> Tensor:
    """[length, batch, features] of a query, key or value, which may be unbatched [length, features]."""
    if has_torch_function((input,)):
        traced: Tensor = handle_torch_function(sequence_first, (input,), input, batch_first)
        return traced
    if input.dim() not in (2, 3):
        raise InputError(f"attention input of shape {list(input.shape)}: expected 2 or 3 dimensions")
    if input.dim() == 2:
        return input.unsqueeze(1)
    return input.transpose(1, 0) if batch_first else input


@public
def unpack(projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The parts of a packed projection [length, batch, parts * features], each contiguous."""
    if has_torch_function((projected,)):
        traced: tuple[Tensor, ...] = handle_torch_function(unpack, (projected,), projected, parts)
        return traced
    features = projected.shape[-1] // parts
    split = projected.reshape(1, *projected.shape[:-1], parts, features).transpose(0, -2).squeeze(-2)
    return tuple(split.contiguous().unbind(0))


@public
def restore_layout(output: Tensor, query: Tensor, batch_first: bool) -> Tensor:
    """Rows [length * batch, features] in the layout of `query`."""
    if has_torch_function((output, query)):
        traced: Tensor = handle_torch_function(restore_layout, (output, query), output, query, batch_first)
        return traced
    if query.dim() == 2:
        return output.view(query.shape[0], 1, -1).squeeze(1)
    batch, length = query.shape[:2] if batch_first else (query.shape[1], query.shape[0])
    output = output.view(length, batch, -1)
    return output.transpose(1, 0) if batch_first else output


def multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    out_proj_weight: Any,
    out_proj_bias: Any,
    *,
    separate: Sequence[Any] | None = None,
    batch_first: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """`F.multi_head_attention_forward` as linear layers with `attention` between them.

    Tensors, or the proxies of a trace. `separate` are (q, k, v)_proj_weight where there is no
    in_proj_weight; `options` are `attention`'s. Which of query, key and value are one tensor decides how
    they are projected.
    """
    q = sequence_first(query, batch_first)
    # without a batch torch makes three tensors of one, and projects each alone
    alone = isinstance(query, Tensor) and query.dim() == 2
    k = q if key is query and not alone else sequence_first(key, batch_first)
    v = k if value is key and not alone else sequence_first(value, batch_first)

    def rows(tensor: Any, start: int, end: int) -> Any:
        if tensor is None:
            return None
        features = tensor.shape[0] // 3
        return tensor[start * features : end * features]

    def project(x: Any, start: int, end: int) -> Any:
        weight = rows(in_proj_weight, start, end) if separate is None else separate[start]
        return F.linear(x, weight, rows(in_proj_bias, start, end))

    if separate is None and q is k and k is v:
        packed = unpack(F.linear(q, in_proj_weight, in_proj_bias), 3)
        projected = (packed[0], packed[1], packed[2])
    elif separate is None and k is v:
        packed = unpack(project(k, 1, 3), 2)
        projected = (project(q, 0, 1), packed[0], packed[1])
    else:
        projected = (project(q, 0, 1), project(k, 1, 2), project(v, 2, 3))
    context, weights = attention(*projected, num_heads=num_heads, batched=query, **options)
    if options["need_weights"] is False:
        weights = None  # not a proxy, which code that asks `is None` would take for weights
    output = F.linear(context, out_proj_weight, out_proj_bias)
    return restore_layout(output, query, batch_first), weights


def decomposed_forward(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """`F.multi_head_attention_forward` by `multi_head_attention`; with static_k or static_v itself."""
    if static_k is not None or static_v is not None:
        raise NotImplementedError("static_k and static_v")
    return multi_head_attention(
        query,
        key,
        value,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
        separate=(q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=add_zero_attn,
        dropout=dropout_p if training else 0.0,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )


@public
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    num_heads: int,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    add_zero_attn: bool = False,
    dropout: float = 0.0,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    batched: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention of projected tensors: softmax(q k^T / sqrt(d)) v for each head.

    >>> rows, weights = fxprop.ops.attention(q, k, v, num_heads=12, need_weights=False)

    Args:
        query: [L, N, E], projected, as are key and value [S, N, E].
        key_padding_mask, attn_mask, need_weights, average_attn_weights, is_causal: as
            `nn.MultiheadAttention.forward` takes them.
        num_heads, bias_k, bias_v, add_zero_attn: as the module has them.
        dropout: the probability in this mode; 0 in eval mode.
        batched: the query before projection; unbatched [L, E] removes the batch from the weights.

    Returns:
        ([L * N, E] rows for the output projection, weights [N, L, S], per head [N, heads, L, S], or
        None without need_weights). Source: torch.nn.functional.multi_head_attention_forward.
    """
    tensors = (
        query,
        key,
        value,
        key_padding_mask,
        attn_mask,
        need_weights,
        average_attn_weights,
        is_causal,
    )
    if has_torch_function(tensors):
        traced: tuple[Tensor, Tensor | None] = handle_torch_function(
            attention,
            tensors,
            *tensors[:5],
            num_heads=num_heads,
            bias_k=bias_k,
            bias_v=bias_v,
            add_zero_attn=add_zero_attn,
            dropout=dropout,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            batched=batched,
        )
        return traced
    unbatched = batched is not None and batched.dim() == 2
    if unbatched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    if is_causal and attn_mask is None:
        raise InputError("attention: is_causal=True needs attn_mask, as nn.MultiheadAttention does")
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None
    elif key_padding_mask is not None:
        is_causal = False
    dtype = query.dtype if batched is None else batched.dtype
    key_padding_mask, attn_mask = _additive(key_padding_mask, dtype), _additive(attn_mask, dtype)
    length, batch, features = query.shape
    heads, head_dim = batch * num_heads, features // num_heads
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask.unsqueeze(0)

    if bias_k is not None and bias_v is not None:
        key = torch.cat([key, bias_k.repeat(1, batch, 1)])
        value = torch.cat([value, bias_v.repeat(1, batch, 1)])
        key_padding_mask, attn_mask = _one_more(key_padding_mask), _one_more(attn_mask)
    q, k, v = (x.reshape(x.shape[0], heads, head_dim).transpose(0, 1) for x in (query, key, value))
    if add_zero_attn:
        zeros = torch.zeros((heads, 1, head_dim), dtype=k.dtype, device=k.device)
        k, v = torch.cat([k, zeros], dim=1), torch.cat([v, zeros], dim=1)
        key_padding_mask, attn_mask = _one_more(key_padding_mask), _one_more(attn_mask)
    source = k.size(1)
    if key_padding_mask is not None:
        padding = key_padding_mask.view(batch, 1, 1, source).expand(-1, num_heads, -1, -1)
        padding = padding.reshape(heads, 1, source)
        attn_mask = padding if attn_mask is None else attn_mask + padding

    if need_weights:
        scaled = q * math.sqrt(1.0 / float(head_dim))
        if attn_mask is not None:
            weights = torch.baddbmm(attn_mask, scaled, k.transpose(-2, -1))
        else:
            weights = torch.bmm(scaled, k.transpose(-2, -1))
        weights = F.softmax(weights, dim=-1)
        if dropout > 0.0:
            weights = F.dropout(weights, p=dropout)
        output = torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, features)
        weights = weights.view(batch, num_heads, length, source)
        if average_attn_weights:
            weights = weights.mean(dim=1)
        return output, weights.squeeze(0) if unbatched else weights

    if attn_mask is not None:
        one_for_all = attn_mask.size(0) == 1 and attn_mask.dim() == 3
        attn_mask = attn_mask.unsqueeze(0) if one_for_all else attn_mask.view(batch, num_heads, -1, source)
    q, k, v = (x.view(batch, num_heads, -1, head_dim) for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
    return output.permute(2, 0, 1, 3).reshape(batch * length, features), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask as numbers to add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _one_more(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))


@public
def check_same(first: Any, second: Any, names: str) -> None:
    """Raise InputError unless both are one object, as they were when the graph was made."""
    if has_torch_function((first, second)):
        handle_torch_function(check_same, (first, second), first, second, names)
    elif first is not second:
        raise InputError(
            f"attention was called with different {names}, but the graph was made for a call with one "
            "tensor for both; transform again with example_inputs that show such a call"
        )

"""nn.MultiheadAttention in a form that torch.fx can trace: its projections become linear layers.

The steps are those of `torch.nn.functional.multi_head_attention_forward` (torch 2.15), to the bit; what
lies between the projections is `fxprop.ops.attention`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from fxprop import ops

fx.has_side_effect(ops.check_same)


def is_attention(module: nn.Module) -> bool:
    """Whether `module` computes what nn.MultiheadAttention does."""
    is_its_own = type(module).forward is nn.MultiheadAttention.forward
    return isinstance(module, nn.MultiheadAttention) and is_its_own


def forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: Any = True,
    attn_mask: Any = None,
    average_attn_weights: Any = True,
    is_causal: Any = False,
) -> tuple[Any, Any]:
    """`nn.MultiheadAttention.forward`; which of query, key and value are one tensor is fixed."""
    first = module.batch_first
    q = ops.sequence_first(query, first)
    k = q if key is query else ops.sequence_first(key, first)
    v = k if value is key else ops.sequence_first(value, first)
    projected = _packed(module, q, k, v) if module._qkv_same_embed_dim else _separate(module, q, k, v)
    rows, weights = ops.attention(
        *projected,
        key_padding_mask,
        attn_mask,
        num_heads=module.num_heads,
        bias_k=module.bias_k,
        bias_v=module.bias_v,
        add_zero_attn=module.add_zero_attn,
        dropout=module.dropout if module.training else 0.0,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
        batched=query,
    )
    output = F.linear(rows, module.out_proj.weight, module.out_proj.bias)
    return ops.restore_layout(output, query, first), weights


def _packed(module: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """As torch.nn.functional._in_projection_packed."""
    weight, bias, features = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    if q is k and k is v:
        packed = ops.unpack(F.linear(q, weight, bias), 3)
        return packed[0], packed[1], packed[2]

    def part(start: int, end: int) -> tuple[Any, Any]:
        rows = slice(start * features, end * features)
        return weight[rows], None if bias is None else bias[rows]

    of_query = F.linear(q, *part(0, 1))
    if k is v:
        packed = ops.unpack(F.linear(k, *part(1, 3)), 2)
        return of_query, packed[0], packed[1]
    return of_query, F.linear(k, *part(1, 2)), F.linear(v, *part(2, 3))


def _separate(module: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """As torch.nn.functional._in_projection."""
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    bias, features = module.in_proj_bias, module.embed_dim
    biases = [None if bias is None else bias[slice(i * features, (i + 1) * features)] for i in range(3)]
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))
    return q, k, v


class TraceableAttention(nn.MultiheadAttention):
    """The class that an attention module is given, in a throw-away copy, to be traced on its own."""

    # which of its arguments are one tensor in every call that was seen
    same: frozenset[str] = frozenset()

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: Any = True,
        attn_mask: Any = None,
        average_attn_weights: Any = True,
        is_causal: Any = False,
    ) -> tuple[Any, Any]:
        if "query is key" in self.same:
            ops.check_same(query, key, "query and key")
            key = query
        if "key is value" in self.same:
            ops.check_same(key, value, "key and value")
            value = key
        return forward(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )

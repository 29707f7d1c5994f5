"""nn.MultiheadAttention in a form that torch.fx can trace: its projections become linear layers.

The steps are those of `torch.nn.functional.multi_head_attention_forward` (torch 2.15), to the bit; what
lies between the projections is `fxprop.ops.attention`.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxprop import ops
from fxprop.ops.attention import multi_head_attention

fx.has_side_effect(ops.check_same)


def is_attention(module: nn.Module) -> bool:
    """Whether `module` computes what nn.MultiheadAttention does."""
    is_its_own = type(module).forward is nn.MultiheadAttention.forward
    return isinstance(module, nn.MultiheadAttention) and is_its_own


def forward(
    self: Any,
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
    same = self.same if isinstance(self, TraceableAttention) else ()
    if "query is key" in same:
        ops.check_same(query, key, "query and key")
        key = query
    if "key is value" in same:
        ops.check_same(key, value, "key and value")
        value = key
    separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    return multi_head_attention(
        query,
        key,
        value,
        self.num_heads,
        self.in_proj_weight,
        self.in_proj_bias,
        self.out_proj.weight,
        self.out_proj.bias,
        separate=separate if self.in_proj_weight is None else None,
        batch_first=self.batch_first,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        bias_k=self.bias_k,
        bias_v=self.bias_v,
        add_zero_attn=self.add_zero_attn,
        dropout=self.dropout if self.training else 0.0,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )


class TraceableAttention(nn.MultiheadAttention):
    """The class that an attention module is given, in a throw-away copy, to be traced on its own."""

    # which of its arguments are one tensor in every call that was seen
    same: frozenset[str] = frozenset()
    forward = forward

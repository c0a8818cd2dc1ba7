"""Causal attention through `scaled_dot_product_attention`, as the core of Megatron Core's SelfAttention.

On a GPU this is FlashAttention or cuDNN, on a CPU the blocked kernel; neither holds the score matrix.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + causal mask) v, with grouped queries (arXiv:2305.13245)."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any) -> Tensor:
        """query: [seq, batch, heads/tp, head_dim]; key, value: [seq, batch, groups/tp, head_dim].

        Returns [seq, batch, heads/tp * head_dim].
        """
        assert attention_mask is None, "attention is causal; a mask would be silently ignored"
        seq, batch, heads, head_dim = query.shape
        # [seq, batch, heads, head_dim] -> [batch, heads, seq, head_dim]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=k.size(1) != heads
        )
        return context.permute(2, 0, 1, 3).reshape(seq, batch, heads * head_dim)

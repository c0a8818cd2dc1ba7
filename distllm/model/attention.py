"""Causal attention, over whole sequences or inside documents, as the core of Megatron Core's SelfAttention.

On a GPU this is FlashAttention or cuDNN, on a CPU our blocks or PyTorch's; none holds the score matrix, nor a
mask of its shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distllm.model.blocked_attention import blocked_attention
from distllm.model.kernels import AS_WRITTEN, Kernels


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim) + causal mask) v, with grouped queries (arXiv:2305.13245)."""

    kernels: Kernels = AS_WRITTEN

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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Return the context, [seq, batch, heads/tp * head_dim].

        query: [seq, batch, heads/tp, head_dim]; key, value: [seq, batch, groups/tp, head_dim].
        attention_mask: none, or where documents begin, [num_documents + 1] integers: see
            attention_in_documents.
        """
        seq, batch, heads, head_dim = query.shape
        if attention_mask is None:
            if are_blocks_faster(query):
                scale = self.softmax_scale or head_dim**-0.5
                kernels = self.kernels if self.training else AS_WRITTEN
                context = blocked_attention(query, key, value, scale, kernels)
                return context.view(seq, batch, heads * head_dim)
            # [seq, batch, heads, head_dim] -> [batch, heads, seq, head_dim]
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            context = causal_attention(q, k, v, self.softmax_scale)
            return context.permute(2, 0, 1, 3).reshape(seq, batch, heads * head_dim)
        # [seq, batch, heads, head_dim] -> [batch * seq, heads, head_dim]; a view where batch is 1
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        context = attention_in_documents(q, k, v, attention_mask, seq, self.softmax_scale)
        return context.reshape(batch, seq, heads * head_dim).transpose(0, 1)


def are_blocks_faster(query: Tensor) -> bool:
    """Return whether our blocks are faster than PyTorch's kernel for query [seq, batch, heads, head_dim].

    Measured speed-ups with heads of 64: in bf16 1.3 x at 512 tokens and 1.1 x at 2,048, compiled 1.9 x and
    1.3 x; in fp32 1.2 x and 0.7 x; with heads of 32 and 256 tokens slower.
    """
    seq, head_dim = query.size(0), query.size(3)
    is_large = query.device.type == "cpu" and head_dim >= 64 and seq >= 512
    return is_large and (query.dtype == torch.bfloat16 or seq <= 1024)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attend over whole sequences.

    query: [batch, heads, seq, head_dim]; key, value: [batch, groups, seq, head_dim].
    """
    is_grouped = key.size(1) != query.size(1)
    if is_grouped and query.is_cuda and query.dtype == torch.float32:
        # PyTorch's only kernel there that holds no score matrix takes no groups (torch 2.13).
        key, value, is_grouped = per_head(key, query.size(1)), per_head(value, query.size(1)), False
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
    )


def per_head(x: Tensor, heads: int) -> Tensor:
    """Return [batch, heads, seq, head_dim] from [batch, groups, seq, head_dim], each group for its heads."""
    return x.repeat_interleave(heads // x.size(1), dim=1)


def attention_in_documents(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Compute causal attention inside each document.

    query: [tokens, heads, head_dim]; key, value: [tokens, groups, head_dim].
    starts: [num_documents + 1] int32, from 0 to tokens.
    longest: an upper bound of the tokens of a document. An exact figure would have to be read from the
        device, which would make the host wait.
    """
    if not has_varlen_kernel(query):
        return attention_by_document(query, key, value, starts, scale)
    kernel, grouped = varlen_kernel()
    context = kernel(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # all before, nothing after: causal
        **grouped,
    )
    assert isinstance(context, Tensor), "nothing else was asked for"
    return context


@cache
def varlen_kernel() -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return FlashAttention over documents, and what it must be told."""
    from torch.nn.attention.varlen import varlen_attn  # here, since it imports PyTorch's compiler

    # PyTorch versions that have this argument (not 2.11) reject grouped queries without it.
    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if takes_groups else {}


def has_varlen_kernel(query: Tensor) -> bool:
    """Return whether FlashAttention supports these heads: half precision on a GPU from Ampere on."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def attention_by_document(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None
) -> Tensor:
    """Do the same, one kernel call per document. The host reads their lengths: on a GPU it waits for them."""
    lengths = starts.diff().tolist()
    contexts = []
    # Not slices: the backward pass of each would fill a gradient of all tokens; that of `split` is one copy.
    for document in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in document)  # [1, heads, length, head_dim]
        contexts.append(causal_attention(q, k, v, scale)[0].transpose(0, 1))
    return torch.cat(contexts)

"""Causal attention for CPUs, as matrix products over blocks of the scores.

PyTorch's own kernel for CPUs (2.13) does its small products at a third of the rate of large ones. Here the
scores of a block of queries against all keys before them are one product, over as many heads as the cache
holds, and nothing after the diagonal block is computed. The formulae are FlashAttention's (Dao et al. 2022,
arXiv:2205.14135, section 3): the backward pass computes the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.model.kernels import AS_WRITTEN, Kernels


@dataclass(frozen=True)
class BlockSize:
    """The size of a block.

    queries: its rows.
    scores: of all heads together, at most; one group of heads may have more.
    """

    queries: int
    scores: int


# The best of those tried with two threads on cores with 1 MiB of cache each, at 512 to 4,096 tokens.
BLOCK_SIZES = {torch.float32: BlockSize(64, 1 << 18), torch.bfloat16: BlockSize(128, 1 << 20)}


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kernels: Kernels = AS_WRITTEN
) -> Tensor:
    """Return the context, of the shape of query.

    query: [seq, batch, heads, head_dim]; key, value: [seq, batch, groups, head_dim].

    Softmax and sums over keys are in fp32. In bf16 a score is rounded to it, since products on a CPU have no
    fp32 output; Megatron's attention without fused kernels does the same.
    """
    seq, batch, num_groups, head_dim = key.shape
    by_group = query.reshape(seq, batch * num_groups, -1, head_dim)
    keys, values = (x.reshape(seq, batch * num_groups, head_dim) for x in (key, value))
    context: Tensor = _BlockedAttention.apply(by_group, keys, values, scale, kernels)
    return context.view(query.shape)


class _BlockedAttention(torch.autograd.Function):
    """Attention over groups of all sequences of the batch, which a product treats alike.

    query: [seq, groups, heads per group, head_dim]; key, value: [seq, groups, head_dim].

    The scale is multiplied into keys where these are copied anyway. A product copies a factor whose memory
    layout does not suit it, at every call, so both factors are stored suitably, but for being parts of longer
    sequences.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, kernels: Kernels
    ) -> Tensor:
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        normalizer = query.new_empty(query.shape[:3], dtype=torch.float32)  # log-sum-exp of the scores
        for part in _parts(query):
            queries = _rows(query[:, part])
            columns_of_keys = (key[:, part] * scale).permute(1, 2, 0).contiguous()  # [groups, head_dim, seq]
            values = value[:, part].transpose(0, 1).contiguous()  # [groups, seq, head_dim]
            for rows in _blocks(query):
                scores = _product(queries[:, :, rows], columns_of_keys[:, :, : rows.stop])
                weights, total, largest = kernels.causal_exponentials(scores)
                weighted = _product(weights, values[:, : rows.stop])
                torch.div(weighted, total, out=_rows(context[:, part])[:, :, rows])
                torch.add(total.log_(), largest, out=_rows(normalizer[:, part])[:, :, rows, None])
        ctx.save_for_backward(query, key, value, context, normalizer)
        ctx.scale, ctx.kernels = scale, kernels
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, context, normalizer = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        # For each row, the term that the softmax subtracts from all of its gradients (the D of the paper).
        offset = ctx.kernels.row_dot(grad_context, context)  # [seq, groups, heads per group]
        for part in _parts(query):
            queries, grads = _rows(query[:, part]), _rows(grad_context[:, part])
            normalizers, offsets = _rows(normalizer[:, part]), _rows(offset[:, part])
            keys = (key[:, part] * ctx.scale).transpose(0, 1).contiguous()  # [groups, seq, head_dim]
            columns_of_keys = keys.transpose(1, 2).contiguous()  # [groups, head_dim, seq]
            columns_of_values = value[:, part].permute(1, 2, 0).contiguous()
            grad_keys, grad_values = (keys.new_zeros(keys.shape, dtype=torch.float32) for _ in range(2))
            for rows in _blocks(query):
                seen = slice(0, rows.stop)
                # [groups, heads per group * rows, head_dim]
                block, block_grads = (x[:, :, rows].flatten(1, 2).contiguous() for x in (queries, grads))
                shape = *queries.shape[:2], -1, rows.stop
                probabilities, grad_scores = ctx.kernels.causal_gradients(
                    torch.bmm(block, columns_of_keys[:, :, seen]).view(shape),
                    torch.bmm(block_grads, columns_of_values[:, :, seen]).view(shape),
                    normalizers[:, :, rows, None],
                    offsets[:, :, rows, None],
                )
                _add_product(grad_values[:, seen], probabilities, block_grads)
                _add_product(grad_keys[:, seen], grad_scores, block)
                _rows(grad_query[:, part])[:, :, rows] = _product(grad_scores, keys[:, seen])
            grad_key[:, part] = grad_keys.mul_(ctx.scale).transpose(0, 1)
            grad_value[:, part] = grad_values.transpose(0, 1)
        return grad_query, grad_key, grad_value, None, None


def _rows(x: Tensor) -> Tensor:
    """View [seq, groups, heads per group, ...] as [groups, heads per group, seq, ...]."""
    return x.movedim(0, 2)


def _parts(query: Tensor) -> Iterator[slice]:
    """Yield all groups, as many at once as the scores of one block allow."""
    seq, num_groups, heads_per_group, _ = query.shape
    block = BLOCK_SIZES[query.dtype]
    size = max(1, block.scores // (heads_per_group * block.queries * seq))
    for first in range(0, num_groups, size):
        yield slice(first, min(first + size, num_groups))


def _blocks(query: Tensor) -> Iterator[slice]:
    size = BLOCK_SIZES[query.dtype].queries
    for first in range(0, len(query), size):
        yield slice(first, min(first + size, len(query)))


def _product(weights: Tensor, columns: Tensor) -> Tensor:
    """Multiply [groups, heads per group, rows, n] by [groups, n, m] to [groups, heads per group, rows, m]."""
    return torch.bmm(weights.flatten(1, 2), columns).unflatten(1, weights.shape[1:3])


def _add_product(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add weights^T rows to total.

    total: fp32 [groups, seen, head_dim].
    weights: [groups, heads per group, rows, seen].
    rows: [groups, heads per group * rows, head_dim].
    """
    transposed = weights.flatten(1, 2).transpose(1, 2)
    if rows.dtype == torch.float32:
        total.baddbmm_(transposed, rows)
    else:
        total.add_(torch.bmm(transposed, rows))

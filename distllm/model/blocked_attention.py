"""Causal attention for processors, out of matrix products over blocks of the scores.

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


@dataclass(frozen=True)
class BlockSize:
    """queries: rows of a block. scores: of all heads together, at most, but for one group of heads."""

    queries: int
    scores: int


# The best of those tried with two threads on cores with 1 MiB of cache each.
BLOCK_SIZES = {torch.float32: BlockSize(64, 1 << 18), torch.bfloat16: BlockSize(128, 1 << 20)}
LARGER_BLOCK = BlockSize(256, 1 << 20)  # above 1,024 tokens


def block_size(query: Tensor) -> BlockSize:
    return LARGER_BLOCK if len(query) > 1024 else BLOCK_SIZES[query.dtype]


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: [seq, batch, heads, head_dim]; key, value: [seq, batch, groups, head_dim]. Returns the shape of
    query. Softmax and sums over keys are in fp32. In bf16 a score is rounded to it, since products on a CPU
    have no fp32 output; Megatron's attention without fused kernels does the same."""
    seq, batch, num_groups, head_dim = key.shape
    by_group = query.reshape(seq, batch * num_groups, -1, head_dim)
    keys, values = (x.reshape(seq, batch * num_groups, head_dim) for x in (key, value))
    context: Tensor = _BlockedAttention.apply(by_group, keys, values, scale)
    return context.view(query.shape)


class _BlockedAttention(torch.autograd.Function):
    """query: [seq, groups, heads per group, head_dim]; key, value: [seq, groups, head_dim]: groups of all
    sequences of the batch, since to a product they are alike."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        normalizer = query.new_empty(query.shape[:3], dtype=torch.float32)  # log-sum-exp of the scores
        for part in _parts(query):
            queries = _rows(query[:, part] * scale)
            keys = key[:, part].permute(1, 2, 0).contiguous()  # [groups, head_dim, seq]
            values = value[:, part].transpose(0, 1).contiguous()  # [groups, seq, head_dim]
            for rows in _blocks(query):
                scores = _scores(queries[:, :, rows], keys[:, :, : rows.stop])
                largest = scores.amax(-1, keepdim=True)
                scores.sub_(largest).exp_()
                total = scores.sum(-1, keepdim=True)
                weighted = torch.bmm(scores.flatten(1, 2).to(query.dtype), values[:, : rows.stop])
                _rows(context[:, part])[:, :, rows] = weighted.view(*scores.shape[:3], -1).div_(total)
                _rows(normalizer[:, part])[:, :, rows] = total.log_().add_(largest)[..., 0]
        ctx.save_for_backward(query, key, value, context, normalizer)
        ctx.scale = scale
        return context

    @staticmethod
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, context, normalizer = ctx.saved_tensors
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        # Of each row, what the softmax takes off all of its gradients (the D of the paper).
        offset = (grad_context.float() * context.float()).sum(-1)  # [seq, groups, heads per group]
        for part in _parts(query):
            queries, grads = _rows(query[:, part] * ctx.scale), _rows(grad_context[:, part])
            normalizers, offsets = _rows(normalizer[:, part]), _rows(offset[:, part])
            keys, values = (x[:, part].transpose(0, 1).contiguous() for x in (key, value))
            grad_keys, grad_values = (x.new_zeros(x.shape, dtype=torch.float32) for x in (keys, values))
            for rows in _blocks(query):
                seen = slice(0, rows.stop)
                scores = _scores(queries[:, :, rows], keys[:, seen].transpose(1, 2))
                probabilities = scores.sub_(normalizers[:, :, rows, None]).exp_()
                block_grads = grads[:, :, rows].flatten(1, 2)  # [groups, heads per group * rows, head_dim]
                _add_product(grad_values[:, seen], probabilities, block_grads)
                grad_scores = torch.bmm(block_grads, values[:, seen].transpose(1, 2)).float()
                grad_scores = grad_scores.view_as(scores).sub_(offsets[:, :, rows, None])
                grad_scores.mul_(probabilities)
                by_key = torch.bmm(grad_scores.flatten(1, 2).to(query.dtype), keys[:, seen])
                _rows(grad_query[:, part])[:, :, rows] = by_key.view(*scores.shape[:3], -1).mul_(ctx.scale)
                _add_product(grad_keys[:, seen], grad_scores, queries[:, :, rows].flatten(1, 2))
            grad_key[:, part] = grad_keys.transpose(0, 1)
            grad_value[:, part] = grad_values.transpose(0, 1)
        return grad_query, grad_key, grad_value, None


def _rows(x: Tensor) -> Tensor:
    """[seq, groups, heads per group, ...] -> [groups, heads per group, seq, ...], a view."""
    return x.movedim(0, 2)


def _parts(query: Tensor) -> Iterator[slice]:
    """All groups, as many at once as the scores of one block allow."""
    seq, num_groups, heads_per_group, _ = query.shape
    block = block_size(query)
    size = max(1, block.scores // (heads_per_group * block.queries * seq))
    for first in range(0, num_groups, size):
        yield slice(first, min(first + size, num_groups))


def _blocks(query: Tensor) -> Iterator[slice]:
    size = block_size(query).queries
    for first in range(0, len(query), size):
        yield slice(first, min(first + size, len(query)))


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """queries: [groups, heads per group, rows, head_dim], the last of the sequence so far; keys: [groups,
    head_dim, seen]. Returns fp32 [groups, heads per group, rows, seen], -inf for keys in the future."""
    rows, seen = queries.size(2), keys.size(2)
    scores = torch.bmm(queries.flatten(1, 2), keys).float().unflatten(1, queries.shape[1:3])
    future = torch.full((rows, rows), -torch.inf).triu_(1)
    scores[..., seen - rows :].add_(future)
    return scores


def _add_product(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """total += weights^T rows. total: fp32 [groups, seen, head_dim]; weights: fp32 [groups, heads per group,
    rows, seen]; rows: [groups, heads per group * rows, head_dim]."""
    transposed = weights.flatten(1, 2).to(rows.dtype).transpose(1, 2)
    if rows.dtype == torch.float32:
        total.baddbmm_(transposed, rows)
    else:
        total.add_(torch.bmm(transposed, rows))

"""Output layer and cross-entropy in one, a chunk of tokens at a time: the logits of a microbatch never exist.

They would be the largest tensor of the model by far: 4 bytes x vocabulary for each token, and as much again
for their gradient. The gradients of a chunk are computed right after its losses, while its logits are there
(as Liger Kernel does, arXiv:2410.10989), so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from distllm.model.size import LOGITS_PER_CHUNK, tokens_per_chunk


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the output layer that this rank holds.

    first: token of the first row. num_real: rows that are tokens; the others are padding and never
    predicted. group: tensor-parallel ranks, which hold the other rows.
    """

    first: int
    num_real: int
    group: dist.ProcessGroup


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    part: VocabularyPart,
    sequence_parallel: bool,
) -> Tensor:
    """hidden: [seq (/tp), batch, hidden]; weight: [padded_vocab/tp, hidden]; labels: [batch, seq].

    With token_weights, [batch, seq]: the sum of weight * loss, in fp32, with gradients for hidden and weight.
    Without: the loss of every token in nats, [batch, seq] in fp32, without gradients.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=part.group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=part.group)
    batch, seq = labels.shape
    flat_hidden = hidden.reshape(seq * batch, -1)  # [seq * batch, hidden], token after token of all sequences
    flat_labels = labels.t().reshape(-1)
    if token_weights is not None:
        total: Tensor = _WeightedLoss.apply(
            flat_hidden, weight, flat_labels, token_weights.t().reshape(-1), part
        )
        return total
    assert not torch.is_grad_enabled(), "the losses of single tokens have no gradients"
    losses = [
        _losses(flat_hidden[rows], weight, flat_labels[rows], part)[1]
        for rows in _chunks(flat_hidden, weight)
    ]
    return torch.cat(losses).view(seq, batch).t().contiguous()


class _WeightedLoss(torch.autograd.Function):
    """Sum of weight * loss over tokens; gradients are computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, part: VocabularyPart
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _chunks(hidden, weight):
            probabilities, losses = _losses(hidden[rows], weight, labels[rows], part)
            total += (losses * token_weights[rows]).sum()
            grad_logits = _grad_logits(probabilities, labels[rows], token_weights[rows], part)
            grad_logits = grad_logits.to(hidden.dtype)  # [tokens of the chunk, vocab/tp]
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            grad_weight.addmm_(grad_logits.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Ranges of tokens, of equal length but for the last."""
    num_tokens, size = len(hidden), tokens_per_chunk(len(weight), LOGITS_PER_CHUNK)
    for first in range(0, num_tokens, size):
        yield slice(first, min(first + size, num_tokens))


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """(probabilities of this rank's rows, [tokens, vocab/tp], losses, [tokens]), both in fp32."""
    logits = (hidden @ weight.t()).float()
    if part.num_real < logits.size(1):
        logits[:, max(0, part.num_real) :] = -torch.inf
    largest = logits.amax(1)
    _reduce(largest, dist.ReduceOp.MAX, part)
    logits -= largest[:, None]
    is_here, rows = _rows_of(labels, logits, part)
    of_label = torch.where(is_here, logits.gather(1, rows[:, None])[:, 0], 0.0)
    exponentials = logits.exp_()
    both = torch.stack([of_label, exponentials.sum(1)])
    _reduce(both, dist.ReduceOp.SUM, part)
    of_label, normalizer = both
    return exponentials.div_(normalizer[:, None]), normalizer.log() - of_label


def _grad_logits(
    probabilities: Tensor, labels: Tensor, token_weights: Tensor, part: VocabularyPart
) -> Tensor:
    """d(weight * loss)/d(logits) in the place of the probabilities."""
    is_here, rows = _rows_of(labels, probabilities, part)
    probabilities.scatter_add_(1, rows[:, None], -is_here[:, None].to(probabilities.dtype))
    return probabilities.mul_(token_weights[:, None])


def _rows_of(labels: Tensor, logits: Tensor, part: VocabularyPart) -> tuple[Tensor, Tensor]:
    """(whether this rank holds a label's row, which row: any where it does not), both [tokens]."""
    rows = labels - part.first
    is_here = (rows >= 0) & (rows < logits.size(1))
    return is_here, torch.where(is_here, rows, 0)


def _reduce(tensor: Tensor, operation: Any, part: VocabularyPart) -> None:
    if part.group.size() > 1:
        dist.all_reduce(tensor, operation, group=part.group)

"""Output layer and cross-entropy fused, a chunk of tokens at a time: a microbatch's logits never exist at
once.

They would be the largest tensor of the model by far: 4 bytes x vocabulary for each token, and as much again
for their gradient. The gradients of a chunk are computed right after its losses, while its logits exist (as
Liger Kernel does, arXiv:2410.10989), so nothing is computed twice.
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

from distllm.model.kernels import AS_WRITTEN, Kernels
from distllm.model.loss_chunks import LOGITS_PER_CHUNK, tokens_per_chunk


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of the output layer that this rank holds.

    first: token of the first row.
    num_real: rows that are tokens; the others are padding and never predicted.
    group: tensor-parallel ranks, which hold the other rows.
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
    kernels: Kernels = AS_WRITTEN,
) -> Tensor:
    """Return the loss of the output layer.

    hidden: [seq (/tp), batch, hidden]; weight: [padded_vocab/tp, hidden]; labels: [batch, seq].

    With token_weights, [batch, seq]: the sum of weight * loss, in fp32. Without: the loss of every token in
    nats, [batch, seq] in fp32, the negative of its log-probability. Both have gradients for hidden and
    weight; with the losses of all tokens the backward pass computes the logits a second time.
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
            flat_hidden, weight, flat_labels, token_weights.t().reshape(-1), part, kernels
        )
        return total
    losses: Tensor = _TokenLosses.apply(flat_hidden, weight, flat_labels, part, kernels)
    return losses.view(seq, batch).t().contiguous()


class _WeightedLoss(torch.autograd.Function):
    """Sum of weight * loss over tokens; gradients are computed in the forward pass.

    With e = exp(logit - largest), n = sum(e) and w the token's weight, the gradient of the logits is (e - n *
    [is the label]) * w / n. The last factor is one number per token, so it is multiplied into the output of
    one product and the input of the other, which saves a further pass over the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        part: VocabularyPart,
        kernels: Kernels,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), _no_gradient(hidden, weight)
        for rows in _chunks(hidden, weight):
            softmax = _softmax(hidden[rows], weight, labels[rows], part, kernels)
            total += (softmax.losses() * token_weights[rows]).sum()
            _add_gradients(softmax, hidden[rows], weight, token_weights[rows], grad_hidden[rows], grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_total), grad_weight.mul_(grad_total), None, None, None, None


class _TokenLosses(torch.autograd.Function):
    """The loss of every token.

    The gradients of the losses are known in the backward pass only, which computes the logits of each chunk
    again instead of keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart, kernels: Kernels
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.part, ctx.kernels = part, kernels
        chunks = _chunks(hidden, weight)
        return torch.cat([_softmax(hidden[r], weight, labels[r], part, kernels).losses() for r in chunks])

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), _no_gradient(hidden, weight)
        for rows in _chunks(hidden, weight):
            softmax = _softmax(hidden[rows], weight, labels[rows], ctx.part, ctx.kernels)
            _add_gradients(softmax, hidden[rows], weight, grad_losses[rows], grad_hidden[rows], grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _add_gradients(
    softmax: _Softmax,
    hidden: Tensor,
    weight: Tensor,
    token_weights: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> None:
    """Write the gradients of a chunk's hidden states, and add those of the output layer."""
    unscaled = softmax.without_label()  # [tokens of the chunk, vocab/tp]
    scale = (token_weights / softmax.normalizer)[:, None]
    torch.mm(unscaled, weight, out=grad_hidden)
    grad_hidden.mul_(scale)
    scaled = (hidden * scale).to(hidden.dtype)
    if grad_weight.dtype == hidden.dtype:
        grad_weight.addmm_(unscaled.t(), scaled)
    else:
        grad_weight.add_(unscaled.t() @ scaled)


def _no_gradient(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return zeros to which chunks add the gradient of the output layer.

    They are in fp32 where there are several chunks: each sum rounded to bf16, the gradient of 64 chunks would
    be off by 9e-3 of its norm instead of 2e-3.
    """
    is_sum = len(hidden) > tokens_per_chunk(len(weight), LOGITS_PER_CHUNK)
    return torch.zeros_like(weight, dtype=torch.float32 if is_sum else weight.dtype)


@dataclass(frozen=True)
class _Softmax:
    """The softmax of a chunk of tokens.

    exponentials: of this rank's logits minus the token's largest, [tokens, vocab/tp].
    row_of_label: index into them, arbitrary where is_label_here is false.
    label_logit: minus the largest, too.
    normalizer: sum of the exponentials of all ranks.

    All but the first are [tokens].
    """

    exponentials: Tensor
    row_of_label: Tensor
    is_label_here: Tensor
    label_logit: Tensor
    normalizer: Tensor

    def losses(self) -> Tensor:
        """Return [tokens] in fp32."""
        return self.normalizer.log() - self.label_logit

    def without_label(self) -> Tensor:
        """Return the exponentials, changed in place: less the normalizer where the label is."""
        row = self.row_of_label[:, None]
        # The label's entry is computed in fp32: for a confident prediction the difference is small.
        of_label = (self.label_logit.exp() - self.normalizer).to(self.exponentials.dtype)
        here = torch.where(self.is_label_here, of_label, self.exponentials.gather(1, row)[:, 0])
        return self.exponentials.scatter_(1, row, here[:, None])


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yield ranges of tokens, of equal length but for the last."""
    num_tokens, size = len(hidden), tokens_per_chunk(len(weight), LOGITS_PER_CHUNK)
    for first in range(0, num_tokens, size):
        yield slice(first, min(first + size, num_tokens))


def _softmax(
    hidden: Tensor, weight: Tensor, labels: Tensor, part: VocabularyPart, kernels: Kernels
) -> _Softmax:
    logits = hidden @ weight.t()  # [tokens, vocab/tp]
    if part.num_real < logits.size(1):
        logits[:, max(0, part.num_real) :] = -torch.inf
    largest = logits.amax(1).float()
    _reduce(largest, dist.ReduceOp.MAX, part)
    row = labels - part.first
    is_here = (row >= 0) & (row < logits.size(1))
    row = torch.where(is_here, row, 0)
    of_label = torch.where(is_here, logits.gather(1, row[:, None])[:, 0].float() - largest, 0.0)
    exponentials, normalizer = kernels.exponentials(logits, largest)
    both = torch.stack([of_label, normalizer])
    _reduce(both, dist.ReduceOp.SUM, part)
    return _Softmax(exponentials, row, is_here, *both)


def _reduce(tensor: Tensor, operation: Any, part: VocabularyPart) -> None:
    if part.group.size() > 1:
        dist.all_reduce(tensor, operation, group=part.group)

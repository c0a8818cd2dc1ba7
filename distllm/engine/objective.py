"""The training objective: what a microbatch contains, and its loss. Implementations are in `objectives/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from distllm.config.schema import Config
from distllm.engine.microbatch import Microbatch
from distllm.layout.groups import Groups


class Objective(ABC):
    """A training objective. The defaults suit a mean over tokens; an objective overrides what differs."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def microbatch(
        self,
        tokens: Tensor,
        loss_weights: Tensor | None,
        document_starts: Tensor | None,
    ) -> Microbatch:
        """Make a microbatch of sequences on the device, as they are read (data/sequences.py: Samples)."""
        return Microbatch(tokens, loss_weights, document_starts)

    def prepare(self, microbatches: Sequence[Microbatch], groups: Groups) -> Sequence[Microbatch]:
        """Prepare this rank's microbatches for the first forward pass. Collective over `groups.loss`.

        By default: give them label weights such that the weighted sum over the global batch is the mean loss.
        """
        return normalized_weights(microbatches, groups)

    @abstractmethod
    def loss_weights(self, batch: Microbatch) -> Tensor | None:
        """Return the weights, [micro_batch, seq], by which the last chunk sums up the losses of tokens.

        With weights, the logits of all tokens never exist at once. None: `loss` gets the losses of all
        tokens, [micro_batch, seq], with gradients; these are the negative log-probabilities of the tokens.
        """

    @abstractmethod
    def loss(self, output: Tensor, batch: Microbatch) -> Tensor:
        """Return the loss of a microbatch, one fp32 number with gradients.

        Its mean over the microbatches and over the data-parallel ranks is the loss of the step.

        output: of the last chunk; see `loss_weights`.
        """

    def validation_sums(self, losses: Tensor, batch: Microbatch) -> Tensor:
        """Return [sum of weight * loss, sum of weights] in fp64. losses: [micro_batch, seq] of all tokens."""
        weights = batch.loss_weights if batch.loss_weights is not None else torch.ones_like(losses)
        return torch.stack([(losses.double() * weights).sum(), weights.double().sum()])


def normalized_weights(microbatches: Sequence[Microbatch], groups: Groups) -> Sequence[Microbatch]:
    """Return the microbatches with label weights that sum to 1 over the global batch.

    The sum is taken of the mean over microbatches and data-parallel ranks. Weights that are all 0 stay 0. The
    host does not wait for the device.
    """
    weights = [batch.loss_weights for batch in microbatches if batch.loss_weights is not None]
    if not weights:
        labels = microbatches[0].labels
        even = torch.full(labels.shape, 1 / labels.numel(), device=labels.device)
        return [replace(batch, loss_weights=even) for batch in microbatches]
    assert len(weights) == len(microbatches), "only some microbatches have weights"
    total = torch.stack([w.sum(dtype=torch.float64) for w in weights]).sum()
    dist.all_reduce(total, group=groups.loss.group)
    # Not `where` with a number: the number is copied to the device, and the host waits for that.
    scale = (len(microbatches) * groups.loss.size / total).masked_fill(total <= 0, 0.0).float()
    return [
        replace(batch, loss_weights=w.float() * scale) for batch, w in zip(microbatches, weights, strict=True)
    ]

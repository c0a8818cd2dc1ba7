"""Forward and backward passes of one step, by Megatron Core's schedules.

The same call drives every layout: without pipeline stages the schedule is a plain loop over microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from distllm.layout.groups import Groups


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one forward pass on one rank.

    tokens: [micro_batch, seq + 1] integers; inputs are all but the last, labels all but the first.
    weights: [micro_batch, seq] of each label in sums over tokens; None means all count.
    """

    tokens: Tensor
    weights: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1].contiguous()

    @property
    def labels(self) -> Tensor:
        return self.tokens[:, 1:].contiguous()

    @property
    def positions(self) -> Tensor:
        batch, seq = self.tokens.size(0), self.tokens.size(1) - 1
        return torch.arange(seq, device=self.tokens.device).expand(batch, seq)


def train_losses(stage: nn.Module, microbatches: Sequence[Microbatch], groups: Groups) -> list[Tensor]:
    """Forward and backward over all microbatches; gradients are those of the mean loss over them.

    Megatron divides each microbatch's loss by their number; nobody else may. Returns, on the last stage, the
    mean loss in nats of each microbatch.
    """

    def forward_step(iterator: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        losses = model(batch.inputs, batch.positions, None, labels=batch.labels)  # [micro_batch, seq]

        def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
            loss = losses.mean()
            return loss, loss.detach().clone()  # Megatron divides the first in place

        return losses, mean

    return _run(forward_step, stage, microbatches, groups, forward_only=False)


@torch.no_grad()
def loss_sums(stage: nn.Module, microbatches: Sequence[Microbatch], groups: Groups) -> Tensor:
    """Forward only: [sum of weight * loss, sum of weights] over this rank's microbatches, in fp64."""

    def forward_step(iterator: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        losses = model(batch.inputs, batch.positions, None, labels=batch.labels)
        weights = batch.weights if batch.weights is not None else torch.ones_like(losses)

        def sums(losses: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.stack([(losses.double() * weights).sum(), weights.double().sum()])
            return losses.mean(), both

        return losses, sums

    results = _run(forward_step, stage, microbatches, groups, forward_only=True)
    return torch.stack(results).sum(0)


def _run(
    forward_step: Callable[..., Any],
    stage: nn.Module,
    microbatches: Sequence[Microbatch],
    groups: Groups,
    forward_only: bool,
) -> list[Tensor]:
    micro_batch_size, seq_plus_one = microbatches[0].tokens.shape
    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[stage],
        num_microbatches=len(microbatches),
        seq_length=seq_plus_one - 1,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        pg_collection=groups.megatron,
    )
    return results

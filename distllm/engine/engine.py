"""What the trainer asks of an engine."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.engine.gradient_watch import GradientWatch
from distllm.engine.pipeline import Microbatch, all_logits, loss_sums, train_loss
from distllm.engine.tied import copy_from_first_stage
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place


@dataclass(frozen=True)
class Limits:
    """What loss and gradient norm of a step may reach; above it, or not finite, there is no update."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def allow(self, loss: float, grad_norm: float) -> bool:
        return (
            math.isfinite(loss)
            and math.isfinite(grad_norm)
            and loss <= self.loss
            and grad_norm <= self.grad_norm
        )


NO_LIMITS = Limits()


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the labels of the global batch, by their weights, in nats. grad_norm: global, before
    clipping.

    is_applied: whether the optimizer has moved. All three are equal on all ranks. wants_stop: whether any
    rank was asked to stop.
    """

    loss: float
    grad_norm: float
    is_applied: bool = True
    wants_stop: bool = False


class Engine(ABC):
    """Weights, gradients and optimizer of this rank. Every method is called on all ranks alike.

    chunks: what the schedule calls, one module per model chunk of this rank. places: of all parameters.
    tied: this rank's copy of an embedding that is tied across stages. is_split: a parameter's fp32 weights
    and optimizer states are shared out over the data-parallel ranks.
    """

    tied: nn.Parameter | None
    is_split: bool

    def __init__(
        self, chunks: Sequence[nn.Module], places: dict[nn.Parameter, Place], groups: Groups
    ) -> None:
        self.chunks = chunks
        self.places = places
        self.groups = groups
        self.device = next(iter(places)).device
        self.gradient_watch = GradientWatch(places)

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        learning_rate: float,
        limits: Limits = NO_LIMITS,
        wants_stop: bool = False,
    ) -> StepResult:
        """One optimizer update from this rank's microbatches of the global batch, unless `limits` forbid it.

        The update is a transaction: loss and gradient norm are judged on all ranks before the optimizer moves
        on any; after a refusal weights and states are what they were, and the gradients are gone.
        """
        self.gradient_watch.begin_step()
        self._begin_step(len(microbatches))
        local_loss = train_loss(self.chunks, microbatches, self.groups)
        loss, is_stopping = self._combine(local_loss, wants_stop)
        self.gradient_watch.local_loss = local_loss
        grad_norm, is_applied = self._optimizer_step(
            learning_rate, lambda grad_norm: limits.allow(loss, grad_norm)
        )
        return StepResult(loss, grad_norm, is_applied, is_stopping)

    def _combine(self, local_loss: Tensor, wants_stop: bool) -> tuple[float, bool]:
        """Mean loss over the data-parallel ranks, and whether any rank of the world wants to stop."""
        combined = torch.stack([local_loss.float(), local_loss.new_tensor(float(wants_stop)).float()])
        dist.all_reduce(combined, group=self.groups.data)
        stops = combined[1:]
        dist.all_reduce(stops, group=self.groups.model)
        loss, num_stops = combined.tolist()
        return loss / self.groups.grid.data, num_stops > 0

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """[sum of losses in nats, number of labels] of all ranks' microbatches, by their weights."""
        self._set_training(False)
        sums = loss_sums(self.chunks, microbatches, self.groups)
        self._set_training(True)
        dist.all_reduce(sums, group=self.groups.data)
        return sums

    def logits(self, tokens: Tensor, vocab_size: int, document_starts: Tensor | None = None) -> Tensor:
        """[batch, seq] integers, equal on all ranks -> [batch, seq, vocab_size] in fp32, on all ranks.

        document_starts: [num_documents + 1] in [batch * seq], as in Microbatch.
        """
        self._set_training(False)
        logits = all_logits(self.chunks, tokens, self.groups, vocab_size, document_starts)
        self._set_training(True)
        return logits

    def before_save(self) -> None:
        """Make what a checkpoint holds once equal wherever it is held, so that a resume changes nothing."""
        if self.tied is None:
            return
        place = self.places[self.tied]
        fragments = [fragment for fragment in self.fragments() if fragment.place is place]
        copy_from_first_stage(
            place,
            fragments,
            {"weight": torch.float32} | self.states(),
            is_split=self.is_split,
            groups=self.groups,
            device=self.device,
        )
        if self.groups.is_last_stage:
            self.after_load(self.scalars())

    def _set_training(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    @abstractmethod
    def _begin_step(self, num_microbatches: int) -> None:
        """Called before the first forward pass of a training step."""

    @abstractmethod
    def _optimizer_step(self, learning_rate: float, allows: Callable[[float], bool]) -> tuple[float, bool]:
        """Reduce what is not reduced yet, and if `allows(norm)`, clip and update.

        Returns the global gradient norm before clipping, and whether the update happened.
        """

    @abstractmethod
    def fragments(self, create_states: Mapping[str, torch.dtype] | None = None) -> list[Fragment]:
        """Live views of all that a checkpoint holds; `create_states` makes missing optimizer states first."""

    @abstractmethod
    def states(self) -> dict[str, torch.dtype]:
        """The optimizer's states per element, by its own words, with their types; none before a step."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """Optimizer state that is one number for all parameters, such as the number of updates."""

    @abstractmethod
    def after_load(self, scalars: Mapping[str, float]) -> None:
        """Take over what a checkpoint wrote into the fragments: scalars and working copies of the weights.

        A checkpoint of weights alone has no scalars. Then the optimizer stays as it is before its first
        update: an AdamW that finds a step beside a parameter takes the other states for made, too.
        """

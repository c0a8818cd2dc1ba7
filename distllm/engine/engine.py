"""What the trainer asks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.engine.pipeline import Microbatch, all_logits, loss_sums, train_loss
from distllm.engine.tied import copy_from_first_stage
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the tokens of the global batch, in nats. grad_norm: global, before clipping."""

    loss: float
    grad_norm: float


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

    def train_step(self, microbatches: Sequence[Microbatch], learning_rate: float) -> StepResult:
        """One optimizer update from this rank's microbatches of the global batch."""
        self._begin_step(len(microbatches))
        loss = train_loss(self.chunks, microbatches, self.groups)
        grad_norm = self._optimizer_step(learning_rate)
        dist.all_reduce(loss, op=dist.ReduceOp.SUM, group=self.groups.data)
        return StepResult(loss.item() / self.groups.grid.data, grad_norm)

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """[sum of losses in nats, number of labels] of all ranks' microbatches, by their weights."""
        self._set_training(False)
        sums = loss_sums(self.chunks, microbatches, self.groups)
        self._set_training(True)
        dist.all_reduce(sums, group=self.groups.data)
        return sums

    def logits(self, tokens: Tensor, vocab_size: int) -> Tensor:
        """[batch, seq] integers, equal on all ranks -> [batch, seq, vocab_size] in fp32, on all ranks."""
        self._set_training(False)
        logits = all_logits(self.chunks, tokens, self.groups, vocab_size)
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
    def _optimizer_step(self, learning_rate: float) -> float:
        """Reduce what is not reduced yet, clip, update; returns the global gradient norm before clipping."""

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
        """Take over what a checkpoint wrote into the fragments: scalars and working copies of the weights."""

"""The interface of an engine, as the trainer uses it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.engine.gradient_watch import GradientWatch
from distllm.engine.microbatch import Microbatch
from distllm.engine.objective import Objective
from distllm.engine.phases import Phases
from distllm.engine.pipeline import all_logits, loss_sums, train_loss
from distllm.engine.tied import copy_from_first_stage
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place


@dataclass(frozen=True)
class Limits:
    """Upper bounds on the loss and the gradient norm of a step.

    There is no update if one of them is above its bound or not finite.
    """

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
    """The result of a training step, equal on all ranks.

    loss: weighted mean over the labels of the global batch, in nats.
    grad_norm: global, before clipping.
    is_applied: whether the optimizer has updated the weights.
    wants_stop: whether any rank was asked to stop.
    """

    loss: float
    grad_norm: float
    is_applied: bool = True
    wants_stop: bool = False


class StepGate:
    """Decides whether the update of a step happens; asked once, between the gradient norm and the update.

    combined: [sum of the data-parallel ranks' losses, number of ranks that want to stop], equal on all ranks.
    """

    def __init__(self, combined: Tensor, num_data_parallel: int, limits: Limits) -> None:
        self._combined = combined
        self._num_data_parallel = num_data_parallel
        self._limits = limits
        self._result: StepResult | None = None

    @property
    def result(self) -> StepResult:
        assert self._result is not None, "the optimizer has not asked whether the step may happen"
        return self._result

    def allows(self, grad_norm: Tensor) -> bool:
        """Return whether the update may happen.

        grad_norm: one element, NaN if it is not known because a gradient is not finite.
        """
        assert self._result is None, "a step is judged once"
        loss_sum, num_stops, norm = wait_for_verdict(self._combined, grad_norm)
        loss = loss_sum / self._num_data_parallel
        self._result = StepResult(loss, norm, self._limits.allow(loss, norm), num_stops > 0)
        return self._result.is_applied


def wait_for_verdict(combined: Tensor, grad_norm: Tensor) -> list[float]:
    """Return `combined` and `grad_norm` as numbers, in one copy from the device.

    This is the one place of a step where the host waits for the device; with NCCL a hang shows here
    (runtime/activity.py). fp64 holds each of the numbers exactly.
    """
    norm = grad_norm.detach().to(combined.device).double().reshape(1)
    numbers: list[float] = torch.cat([combined.double(), norm]).tolist()
    return numbers


class Engine(ABC):
    """Weights, gradients and optimizer of this rank. Every method is called on all ranks alike.

    chunks: the modules that the schedule calls, one per model chunk of this rank.
    places: of all parameters of this rank.
    phases: times the steps; the caller of `train_step` also calls `phases.end_step`.
    tied: this rank's copy of an embedding that is tied across pipeline stages; None if there is none.
    is_split: whether fp32 weights and optimizer states are partitioned over the data-parallel ranks.
    """

    tied: nn.Parameter | None
    is_split: bool

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        places: dict[nn.Parameter, Place],
        groups: Groups,
        objective: Objective,
    ) -> None:
        self.chunks = chunks
        self.places = places
        self.groups = groups
        self.objective = objective
        self.device = next(iter(places)).device
        self.gradient_watch = GradientWatch(places)
        self.phases = Phases(self.device)

    def train_step(
        self,
        microbatches: Sequence[Microbatch],
        learning_rate: float,
        limits: Limits = NO_LIMITS,
        wants_stop: bool = False,
    ) -> StepResult:
        """Do one optimizer update from this rank's microbatches of the global batch, if `limits` allow it.

        The update is a transaction: loss and gradient norm of all ranks are compared with the limits before
        any rank updates its weights. After a refusal weights and optimizer states are unchanged, and the
        gradients are dropped.
        """
        self.gradient_watch.begin_step()
        self._begin_step(len(microbatches))
        local_loss = train_loss(self.chunks, microbatches, self.groups, self.objective, self.phases)
        self.gradient_watch.local_loss = local_loss
        with self.phases.phase("optimizer"):
            combined = self._combine(local_loss, wants_stop)
            gate = StepGate(combined, self.groups.loss.size, limits)
            self._optimizer_step(learning_rate, gate)
        return gate.result

    def _combine(self, local_loss: Tensor, wants_stop: bool) -> Tensor:
        """Return [sum of the data-parallel ranks' losses, number of ranks of the world that want to stop]."""
        # Filled on the device: a copy from the host would wait for it.
        stop = torch.full_like(local_loss, float(wants_stop), dtype=torch.float32)
        combined = torch.stack([local_loss.float(), stop])
        dist.all_reduce(combined, group=self.groups.loss.group)
        dist.all_reduce(combined[1:], group=self.groups.model)
        return combined

    def evaluate(self, microbatches: Sequence[Microbatch]) -> Tensor:
        """Return [sum of losses in nats, number of labels] of all ranks' microbatches, both weighted."""
        self._set_training(False)
        sums = loss_sums(self.chunks, microbatches, self.groups, self.objective)
        self._set_training(True)
        dist.all_reduce(sums, group=self.groups.loss.group)
        return sums

    def logits(self, tokens: Tensor, vocab_size: int, document_starts: Tensor | None = None) -> Tensor:
        """Return the logits, [batch, seq, vocab_size] in fp32, on all ranks.

        tokens: [batch, seq] integers, equal on all ranks.
        document_starts: [num_documents + 1] in [batch * seq], as in Microbatch.
        """
        self._set_training(False)
        logits = all_logits(self.chunks, tokens, self.groups, vocab_size, document_starts)
        self._set_training(True)
        return logits

    def before_save(self) -> None:
        """Make the copies of what a checkpoint holds only once equal, so that a resume changes nothing."""
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

    def release(self) -> None:  # noqa: B027  # some have nothing to undo
        """Undo what would keep the engine in memory, in a process that will make other engines."""

    def _set_training(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    @abstractmethod
    def _begin_step(self, num_microbatches: int) -> None:
        """Prepare for the first forward pass of a training step."""

    @abstractmethod
    def _optimizer_step(self, learning_rate: float, gate: StepGate) -> None:
        """Reduce the gradients that are not reduced yet, and if `gate.allows(norm)`, clip and update.

        norm: of all gradients, before clipping. Nothing after the gate may wait for the device.
        """

    @abstractmethod
    def fragments(self, create_states: Mapping[str, torch.dtype] | None = None) -> list[Fragment]:
        """Return live views of this rank's part of all that a checkpoint holds.

        create_states: optimizer states to create first where they are missing, with their dtypes.
        """

    @abstractmethod
    def states(self) -> dict[str, torch.dtype]:
        """Return names (the optimizer's own) and dtypes of its states per element; empty before a step."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """Return the optimizer state that is one number for all parameters, such as the number of updates."""

    @abstractmethod
    def after_load(self, scalars: Mapping[str, float]) -> None:
        """Complete a load into the fragments: set the scalars and refresh the working copies of the weights.

        A checkpoint of weights alone has no scalars. Then the optimizer stays as it is before its first
        update: an AdamW that finds a step for a parameter assumes that its other states exist, too.
        """

"""How far training has come: all that a resume needs beside weights and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from distllm.lineage.history import (
    History,
    Ranges,
    consumed_by_source,
    consumed_samples,
    history_from_plain,
    with_plan,
)


@dataclass(frozen=True)
class TrainState:
    """How far training has come.

    step: number of updates done.
    next_sample: global number of the sample with which the next step begins; together with the history it is
        the whole state of the data, whose order is a function of both.
    skipped: ranges [first, end) of samples that no update has seen or will see, in order.
    losses, grad_norms: of the last steps, newest last, for the bounds of the guard.
    history: which samples came in which steps, and from which mixture.
    """

    step: int = 0
    next_sample: int = 0
    skipped: Ranges = ()
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    history: History = ()

    @property
    def consumed_samples(self) -> int:
        """Return the number of samples that updates have seen."""
        return consumed_samples(self.next_sample, self.skipped)

    def consumed_by_source(self) -> dict[str, int]:
        """Return the number of samples that updates have seen, of each source of the mixture so far."""
        return consumed_by_source(self.history, self.next_sample, self.skipped)

    def samples(self, global_batch_size: int) -> range:
        """Return the samples of the next step."""
        return range(self.next_sample, self.next_sample + global_batch_size)

    def planned(self, global_batch_size: int, weights: Mapping[str, float]) -> TrainState:
        """Return the state for a step of this batch size from this mixture, with both in its history."""
        state = self.for_batch(global_batch_size)
        history = with_plan(state.history, state.step, state.next_sample, global_batch_size, weights)
        return replace(state, history=history)

    def after_step(self, global_batch_size: int, loss: float, grad_norm: float, window: int) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            next_sample=self.next_sample + global_batch_size,
            losses=(*self.losses, loss)[-window:],
            grad_norms=(*self.grad_norms, grad_norm)[-window:],
        ).for_batch(global_batch_size)

    def without(self, samples: range) -> TrainState:
        """Return the state in which these samples are skipped."""
        skipped = (*self.skipped, (samples.start, samples.stop))
        return replace(self, skipped=tuple(sorted(skipped))).for_batch(len(samples))

    def for_batch(self, global_batch_size: int) -> TrainState:
        """Return the state for steps of this batch size, which may differ from the size before.

        The next step begins after the skipped ranges that it would overlap. If a range begins within the step
        (because the batch size has changed since), the samples of the step before the range are skipped, too.
        """
        state = self
        for first, end in self.skipped:
            if first < state.next_sample + global_batch_size and end > state.next_sample:
                widened = (min(first, state.next_sample), end)
                skipped = tuple(widened if part == (first, end) else part for part in state.skipped)
                state = replace(state, next_sample=end, skipped=skipped)
        return state

    def to_plain(self) -> dict[str, Any]:
        """Return the state as JSON values, for the manifest of a checkpoint."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> TrainState:
        """Return the state from what `to_plain` returned, after it was read back from JSON."""
        return cls(
            step=plain["step"],
            next_sample=plain["next_sample"],
            skipped=tuple((first, end) for first, end in plain["skipped"]),
            losses=tuple(plain["losses"]),
            grad_norms=tuple(plain["grad_norms"]),
            history=history_from_plain(plain["history"]),
        )

"""The samples of every step, as a function of a short history. Pure arithmetic.

Nothing is written per sample. A run's history is one stretch for every change of its plan (batch size,
weights of the mixture, samples that a guard has left out); everything else follows from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distllm.data.mixture import Blend, counts_before


@dataclass(frozen=True)
class Stretch:
    """Steps that follow one plan, until the next stretch begins.

    step: updates before its first.
    first_sample: with which that update begins.
    batch_size: samples of each update.
    weights: of the sources.
    """

    step: int
    first_sample: int
    batch_size: int
    weights: Mapping[str, float]

    def first_sample_of(self, step: int) -> int:
        """Return the sample with which the update after `step` updates begins."""
        return self.first_sample + (step - self.step) * self.batch_size


History = tuple[Stretch, ...]
# [first, end) of samples that no update has seen or will see, in order.
Ranges = tuple[tuple[int, int], ...]


def with_plan(
    history: History, step: int, next_sample: int, batch_size: int, weights: Mapping[str, float]
) -> History:
    """Return the history once the update after `step` updates is known to begin with `next_sample`."""
    if history:
        last = history[-1]
        is_as_planned = last.first_sample_of(step) == next_sample and last.batch_size == batch_size
        if is_as_planned and last.weights == weights:
            return history
    return (*history, Stretch(step, next_sample, batch_size, dict(weights)))


def samples_of_step(history: History, step: int) -> range:
    """Return the samples of update number `step`, the first being 1."""
    assert step >= 1, f"steps are counted from 1, not {step}"
    # Of stretches that begin alike, only the last has steps; the others' samples were left out.
    stretch = next(stretch for stretch in reversed(history) if stretch.step < step)
    first = stretch.first_sample_of(step - 1)
    return range(first, first + stretch.batch_size)


def blends(history: History) -> list[Blend]:
    """Return the mixture as a function of the sample: a new blend only where weights change."""
    found: list[Blend] = []
    for stretch in history:
        if not found or stretch.weights != found[-1].weights:
            found.append(Blend(stretch.first_sample, stretch.weights))
    return found


def consumed_samples(next_sample: int, skipped: Ranges) -> int:
    """Return the number of samples before `next_sample` that updates have seen."""
    return next_sample - sum(end - first for first, end in _behind(next_sample, skipped))


def consumed_by_source(history: History, next_sample: int, skipped: Ranges) -> dict[str, int]:
    """Return the same for each source that the mixture has had so far."""
    drawn_from = blends(history)
    consumed = Counter(counts_before(next_sample, drawn_from))
    for first, end in _behind(next_sample, skipped):
        consumed.update(counts_before(first, drawn_from))
        consumed.subtract(counts_before(end, drawn_from))
    return dict(consumed)


def _behind(next_sample: int, skipped: Ranges) -> Ranges:
    return tuple((first, end) for first, end in skipped if end <= next_sample)


def history_to_plain(history: History) -> list[dict[str, Any]]:
    return [asdict(stretch) for stretch in history]


def history_from_plain(plain: Sequence[Mapping[str, Any]]) -> History:
    return tuple(Stretch(**stretch) for stretch in plain)

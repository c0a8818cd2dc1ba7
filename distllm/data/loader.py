"""What every data-parallel rank reads in every step: a pure function of seed, mixture and prepared data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distllm.config.problems import UserError, user_error
from distllm.data.mixture import Phase, draw
from distllm.data.order import Order, sequence_numbers
from distllm.data.sequences import Samples, Sequences


@dataclass(frozen=True)
class TrainingSource:
    """max_epochs: how often each sequence may be seen; None means without limit. limit_setting: what users
    call that."""

    sequences: Sequences
    order: Order
    max_epochs: int | None = None
    limit_setting: str = "data.max_epochs"


@dataclass(frozen=True)
class Located:
    """Where global samples lie: the source's name, how often its sequences were all seen before, and which of
    its sequences it is. epochs, sequences: int64 [n]."""

    sources: list[str]
    epochs: np.ndarray
    sequences: np.ndarray


@dataclass(frozen=True)
class StepShape:
    """How a step's samples are shared out. global_batch_size: of all ranks together."""

    global_batch_size: int
    micro_batch_size: int
    dp_size: int

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.micro_batch_size * self.dp_size) == 0, (
            f"layout_rules.py must refuse a global batch of {self.global_batch_size} "
            f"on {self.dp_size} ranks x {self.micro_batch_size}"
        )

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def samples(self, first_sample: int, microbatch: int, dp_rank: int) -> range:
        """Of one microbatch of the step that begins with `first_sample`; all numbers count from 0.

        Over all ranks and microbatches the step reads range(first_sample, first_sample + global_batch_size),
        each sample once, whatever dp_size is: so a run can go on with another number of ranks.
        """
        assert 0 <= dp_rank < self.dp_size, f"data-parallel rank {dp_rank} of {self.dp_size}"
        assert 0 <= microbatch < self.num_microbatches, f"no microbatch {microbatch} in a step"
        first = first_sample + (microbatch * self.dp_size + dp_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class TrainingData:
    """The sources of a job, drawn from by its mixture. Global samples count on without end."""

    def __init__(self, sources: Mapping[str, TrainingSource]) -> None:
        self.sources = sources

    def locate(self, samples: np.ndarray, phases: Sequence[Phase]) -> Located:
        """Where global `samples`, int64 [n], lie. User error: a source would be seen too often."""
        draws = draw(samples, phases)
        names = [draws.names[source] for source in draws.sources.tolist()]
        epochs, sequences = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(draws.sources):
            name, chosen = draws.names[number], draws.sources == number
            source = self.sources[name]
            num_sequences = source.sequences.num_sequences
            epochs[chosen], positions = np.divmod(draws.source_samples[chosen], num_sequences)
            if source.max_epochs is not None and epochs[chosen].max() >= source.max_epochs:
                raise exhausted(source, f"at sample {int(samples[chosen].max()):,}")
            sequences[chosen] = sequence_numbers(epochs[chosen], positions, num_sequences, source.order)
        return Located(names, epochs, sequences)

    def read(self, samples: range, phases: Sequence[Phase]) -> Samples:
        """The sequences of consecutive global samples, in order."""
        located = self.locate(np.arange(samples.start, samples.stop, dtype=np.int64), phases)
        parts = [
            self.sources[name].sequences.read(located.sequences[row : row + 1])
            for row, name in enumerate(located.sources)
        ]
        return concatenate(parts)

    def microbatches(
        self, first_sample: int, phases: Sequence[Phase], dp_rank: int, shape: StepShape
    ) -> list[Samples]:
        """What one data-parallel rank reads in the step that begins with `first_sample`."""
        return [
            self.read(shape.samples(first_sample, microbatch, dp_rank), phases)
            for microbatch in range(shape.num_microbatches)
        ]


def concatenate(parts: Sequence[Samples]) -> Samples:
    """Samples one after the other; all of one job, so either all have weights and starts, or none."""
    tokens = np.concatenate([part.tokens for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    starts, num_inputs = [np.empty(0, np.int32)], 0
    for part in parts:
        if part.document_starts is not None:
            starts.append(part.document_starts[:-1] + num_inputs)
            num_inputs += int(part.document_starts[-1])
    assert len(weights) in (0, len(parts)), "sequences.packing is one for all sources"
    return Samples(
        tokens,
        np.concatenate(weights) if weights else None,
        np.append(np.concatenate(starts), num_inputs).astype(np.int32) if num_inputs else None,
    )


def exhausted(source: TrainingSource, when: str) -> UserError:
    return user_error(
        source.limit_setting,
        source.max_epochs,
        f"the source would be seen more often {when}",
        "more epochs, a smaller weight, fewer train.steps, or data.changes that leave the source out in time",
    )

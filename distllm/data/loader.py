"""The samples that each data-parallel rank reads in a step: a function of seed, mixture and prepared data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distllm.config.problems import UserError, user_error
from distllm.data.mixture import Blend, draw
from distllm.data.order import Order, sequence_numbers
from distllm.data.sequences import Samples, Sequences, gather


@dataclass(frozen=True)
class TrainingSource:
    """A source that training draws from.

    max_epochs: how often each sequence may be seen; None means without limit.
    limit_setting: the setting by which users choose that limit.
    """

    sequences: Sequences
    order: Order
    max_epochs: int | None = None
    limit_setting: str = "data.max_epochs"


@dataclass(frozen=True)
class Located:
    """The places of global samples.

    sources: the sources' names, one for each sample.
    epochs: int64 [n], how often all of the source's sequences were seen before.
    sequences: int64 [n], the number of each sequence within its source.
    """

    sources: list[str]
    epochs: np.ndarray
    sequences: np.ndarray


@dataclass(frozen=True)
class StepShape:
    """How a step's samples are divided among ranks. global_batch_size: samples of all ranks together."""

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
        """Return the samples of one microbatch of the step that begins with `first_sample`; all count from 0.

        Over all ranks and microbatches the step reads range(first_sample, first_sample + global_batch_size),
        each sample once, whatever dp_size is: so a run can continue with another number of ranks.
        """
        assert 0 <= dp_rank < self.dp_size, f"data-parallel rank {dp_rank} of {self.dp_size}"
        assert 0 <= microbatch < self.num_microbatches, f"no microbatch {microbatch} in a step"
        first = first_sample + (microbatch * self.dp_size + dp_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class TrainingData:
    """The sources of a job, drawn from by its mixture. Global samples are numbered without end."""

    def __init__(self, sources: Mapping[str, TrainingSource]) -> None:
        self.sources = sources

    def locate(self, samples: np.ndarray, blends: Sequence[Blend]) -> Located:
        """Locate global `samples`, int64 [n]. User error: a source would be seen too often."""
        draws = draw(samples, blends)
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

    def read(self, samples: range, blends: Sequence[Blend]) -> Samples:
        """Read the sequences of consecutive global samples, in order."""
        return gather(self._rows(np.arange(samples.start, samples.stop, dtype=np.int64), blends))

    def microbatches(
        self, first_sample: int, blends: Sequence[Blend], dp_rank: int, shape: StepShape
    ) -> list[Samples]:
        """Read the microbatches of one data-parallel rank in the step that begins with `first_sample`."""
        parts = [shape.samples(first_sample, number, dp_rank) for number in range(shape.num_microbatches)]
        rows = self._rows(np.concatenate([np.arange(part.start, part.stop) for part in parts]), blends)
        size = shape.micro_batch_size
        return [gather(rows[first : first + size]) for first in range(0, len(rows), size)]

    def _rows(self, samples: np.ndarray, blends: Sequence[Blend]) -> list[tuple[Sequences, int]]:
        located = self.locate(samples, blends)
        return [
            (self.sources[name].sequences, sequence)
            for name, sequence in zip(located.sources, located.sequences.tolist(), strict=True)
        ]


def exhausted(source: TrainingSource, when: str) -> UserError:
    return user_error(
        source.limit_setting,
        source.max_epochs,
        f"the source would be seen more often {when}",
        "more epochs, a smaller weight, fewer train.steps, or data.changes that leave the source out in time",
    )

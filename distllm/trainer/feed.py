"""What feeds training: the sequences of all sources, and the microbatches of each step, read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distllm.config.schema import Config
from distllm.data.ledger import phases
from distllm.data.loader import StepShape, TrainingData, TrainingSource, exhausted
from distllm.data.mixture import Phase, counts_before
from distllm.data.order import Order
from distllm.data.prefetch import Prefetcher
from distllm.data.prepared import PreparedData, PreparedSource, Split
from distllm.data.record import to_record
from distllm.data.sequences import Samples, Sequences, open_sequences
from distllm.engine.pipeline import Microbatch
from distllm.trainer.state import TrainState


@dataclass(frozen=True)
class OpenedData:
    """validation: by source, in the order of the config; empty where the job never validates.
    records: what checkpoints and the ledger keep of each source."""

    training: TrainingData
    validation: dict[str, Sequences]
    records: dict[str, dict[str, Any]]


def open_data(config: Config, prepared: PreparedData, report: Callable[[str], None]) -> OpenedData:
    """Needs no process group: a packing that is made now may take a while. User error: not one sequence."""

    def open_split(source: PreparedSource, split: Split) -> Sequences:
        cache = Path(config.data.cache).expanduser().absolute()
        return open_sequences(
            source, split, config.sequences, config.model.seq_length, prepared.end_of_document, cache, report
        )

    training: dict[str, TrainingSource] = {}
    validation: dict[str, Sequences] = {}
    for name, settings in config.data.named_sources.items():
        source = prepared.sources[name]
        order = Order(config.train.seed, name, settings.shuffle)
        limit_setting = f"{config.data.place(name)}.max_epochs"
        sequences = open_split(source, source.train)
        training[name] = TrainingSource(sequences, order, settings.max_epochs, limit_setting)
        if source.validation is not None and config.train.validation_interval > 0:
            validation[name] = open_split(source, source.validation)
    records = {
        name: to_record(prepared.sources[name], source.order.shuffle, source.sequences.num_sequences)
        for name, source in training.items()
    }
    return OpenedData(TrainingData(training), validation, records)


def planned_samples(config: Config, state: TrainState) -> dict[str, int]:
    """How many samples each source will have given after the last step, if no step is refused."""
    batch_size, steps = config.train.global_batch_size, config.train.steps
    for step in (state.step, *sorted({change.step for change in config.data.changes})):
        if state.step <= step < steps:
            first = state.next_sample + (step - state.step) * batch_size
            state = TrainState(step, first, state.skipped, history=state.history)
            state = state.planned(batch_size, config.data.weights_at(step))
    last = state.next_sample + (steps - state.step) * batch_size
    return counts_before(last, phases(state.history)) if state.history else {}


def refuse_exhausted(config: Config, training: TrainingData, state: TrainState) -> None:
    """A user error if the steps that are left would see a source more often than it allows."""
    for name, count in planned_samples(config, state).items():
        source = training.sources.get(name)
        if source is None or source.max_epochs is None:
            continue
        available = source.max_epochs * source.sequences.num_sequences
        if count > available:
            raise exhausted(source, f"by the last step: {count:,} samples; {available:,} are allowed")


@dataclass(frozen=True)
class _Request:
    """The step that begins with this sample."""

    first_sample: int
    phases: list[Phase]


class Feed:
    """The microbatches of one data-parallel rank, on its device."""

    def __init__(
        self, training: TrainingData, shape: StepShape, dp_rank: int, device: torch.device, prefetch: int
    ) -> None:
        self._training = training
        self._shape = shape
        self._dp_rank = dp_rank
        self._device = device
        self._prefetcher = Prefetcher(self._read, self._following, prefetch)

    def microbatches(self, state: TrainState) -> list[Microbatch]:
        """Of the next step; `state` is planned."""
        return self._prefetcher.get(_Request(state.next_sample, phases(state.history)))

    def close(self) -> None:
        self._prefetcher.close()

    def _following(self, request: _Request) -> Iterator[_Request]:
        first = request.first_sample
        while True:
            first += self._shape.global_batch_size
            yield _Request(first, request.phases)

    def _read(self, request: _Request) -> list[Microbatch]:
        samples = self._training.microbatches(
            request.first_sample, request.phases, self._dp_rank, self._shape
        )
        return [to_microbatch(part, self._device) for part in samples]


def to_microbatch(samples: Samples, device: torch.device) -> Microbatch:
    """On its way to the device: the copy from pinned memory waits for nothing and nothing waits for it but
    the kernels that read it."""

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Microbatch(
        move(samples.tokens),
        None if samples.weights is None else move(samples.weights),
        None if samples.document_starts is None else move(samples.document_starts),
    )

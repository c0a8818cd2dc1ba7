"""The sequences of all sources, opened for training and validation, and whether there are enough of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.schema import Config
from distllm.data.loader import TrainingData, TrainingSource, exhausted
from distllm.data.mixture import counts_before
from distllm.data.order import Order
from distllm.data.prepared import PreparedData, PreparedSource, Split
from distllm.data.record import to_record
from distllm.data.sequences import Sequences, open_sequences
from distllm.lineage.history import blends
from distllm.trainer.state import TrainState


@dataclass(frozen=True)
class OpenedData:
    """The sequences that a job reads.

    validation: by source, in the order of the config; empty if the job never validates.
    records: what checkpoints and the ledger keep of each source.
    """

    training: TrainingData
    validation: dict[str, Sequences]
    records: dict[str, dict[str, Any]]


def open_data(config: Config, prepared: PreparedData, report: Callable[[str], None]) -> OpenedData:
    """Open the sequences of all sources. User error: a split has not one sequence.

    This needs no process group, since packing the sequences, if that is not done yet, can take a while.
    """

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
    """Return how many samples of each source will have been used after the last step, if none is refused."""
    batch_size, steps = config.train.global_batch_size, config.train.steps
    for step in (state.step, *sorted({change.step for change in config.data.changes})):
        if state.step <= step < steps:
            first = state.next_sample + (step - state.step) * batch_size
            state = TrainState(step, first, state.skipped, history=state.history)
            state = state.planned(batch_size, config.data.weights_at(step))
    last = state.next_sample + (steps - state.step) * batch_size
    return counts_before(last, blends(state.history)) if state.history else {}


def refuse_exhausted(config: Config, training: TrainingData, state: TrainState) -> None:
    """Raise a user error if the remaining steps would repeat a source more often than it allows."""
    for name, count in planned_samples(config, state).items():
        source = training.sources.get(name)
        if source is None or source.max_epochs is None:
            continue
        available = source.max_epochs * source.sequences.num_sequences
        if count > available:
            raise exhausted(source, f"by the last step: {count:,} samples; {available:,} are allowed")

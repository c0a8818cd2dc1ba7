"""Trace a step back to the documents that its sequences came from, recomputed from the ledger."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from distllm.config.problems import user_error
from distllm.config.schema import Sequences as Settings
from distllm.data.file_array import FileArray
from distllm.data.loader import TrainingData, TrainingSource
from distllm.data.order import Order
from distllm.data.prepared import PreparedSource
from distllm.data.record import from_record
from distllm.data.sequences import Sequences, open_sequences
from distllm.lineage.history import blends, samples_of_step
from distllm.lineage.ledger import Ledger

ORIGIN = np.dtype([("file", "<u4"), ("row", "<u8")])  # of a document: number in files.json, row from 0


@dataclass(frozen=True)
class Origin:
    """Tokens start to stop - 1 of a document of num_tokens tokens.

    file, row: where the document came from, rows counted from 0; None where only token files are known.
    """

    document: int
    start: int
    stop: int
    num_tokens: int
    file: str | None
    row: int | None


@dataclass(frozen=True)
class TracedSample:
    sample: int
    source: str
    epoch: int
    sequence: int
    origins: list[Origin]


class TracedSource:
    """One source's sequences, and the origins of their documents."""

    def __init__(self, source: PreparedSource, sequences: Sequences) -> None:
        self._source = source
        self.sequences = sequences
        origins, files = source.folder / "train.origins", source.folder / "files.json"
        self._origins = FileArray(origins, ORIGIN) if origins.is_file() else None
        self._files = [file[0] for file in json.loads(files.read_text())] if files.is_file() else []

    def origins(self, sequence: int) -> list[Origin]:
        stream = self.sequences.stream
        found = []
        for span in self.sequences.document_spans(sequence):
            document = stream.document_at(span.start)
            begin, end = stream.offsets(document, 2).tolist()
            file = row = None
            if self._origins is not None:
                (origin,) = self._origins.read(document, document + 1).tolist()
                file, row = self._files[origin[0]], origin[1]
            found.append(Origin(document, span.start - begin, span.stop - begin, end - begin, file, row))
        return found


def open_sources(ledger: Ledger) -> dict[str, TracedSource]:
    """Open the sources. User error: prepared data is missing, or differs from what the run was trained on."""
    sources = {}
    for name, record in ledger.records.items():
        source = from_record(name, record)
        manifest = source.folder / "manifest.json"
        found = json.loads(manifest.read_text())["fingerprint"] if manifest.is_file() else "nothing"
        if found != source.fingerprint:
            rule = (
                f"must hold source {name} as it was trained on, fingerprint {source.fingerprint}; has {found}"
            )
            raise user_error(
                "data.cache", source.folder, rule, "restore the folder, or prepare the data again"
            )
        settings = Settings(packing=ledger.packing, document_mask=False, prefetch=0)  # type: ignore[arg-type]
        sequences = open_sequences(
            source, source.train, settings, ledger.seq_length, 0, ledger.cache, report=lambda _: None
        )
        sources[name] = TracedSource(source, sequences)
    return sources


def training_data(ledger: Ledger, sources: dict[str, TracedSource]) -> TrainingData:
    return TrainingData(
        {
            name: TrainingSource(source.sequences, Order(ledger.seed, name, ledger.records[name]["shuffle"]))
            for name, source in sources.items()
        }
    )


def trace(ledger: Ledger, step: int) -> list[TracedSample]:
    """Return every sequence of update number `step`, in the order of samples."""
    sources = open_sources(ledger)
    samples = samples_of_step(ledger.history, step)
    located = training_data(ledger, sources).locate(
        np.arange(samples.start, samples.stop, dtype=np.int64), blends(ledger.history)
    )
    return [
        TracedSample(sample, name, epoch, sequence, sources[name].origins(sequence))
        for sample, name, epoch, sequence in zip(
            samples, located.sources, located.epochs.tolist(), located.sequences.tolist(), strict=True
        )
    ]

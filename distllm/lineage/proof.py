"""The proof that every sequence came once: no sample missing, none twice, across resumes and changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from distllm.data.loader import TrainingData
from distllm.data.mixture import counts_before
from distllm.lineage.history import History, blends, consumed_by_source, consumed_samples, samples_of_step
from distllm.lineage.ledger import Ledger
from distllm.lineage.origins import open_sources, training_data

SAMPLES_AT_A_TIME = 1 << 20


@dataclass
class Proof:
    """The result of the proof.

    faults: what is wrong, empty if the run is correct.
    trained: sequences that updates have seen.
    left_out: samples that a guard has rejected.
    epochs: of each source, sequences seen in each epoch.
    """

    first_step: int
    last_step: int
    trained: int = 0
    left_out: int = 0
    epochs: dict[str, dict[int, int]] = field(default_factory=dict)
    num_sequences: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def prove(ledger: Ledger, first_step: int, last_step: int) -> Proof:
    """Go through every sample of the steps first_step to last_step, and mark its sequence as seen.

    Detects a sample in two steps or in none that no guard has left out; a sequence that comes twice in an
    epoch; one that is missing from an epoch that these steps go through as a whole.
    """
    proof = Proof(first_step, last_step)
    sources = open_sources(ledger)
    data, drawn_from = training_data(ledger, sources), blends(ledger.history)
    proof.num_sequences = {name: source.sequences.num_sequences for name, source in sources.items()}
    ranges = [samples_of_step(ledger.history, step) for step in range(first_step, last_step + 1)]
    proof.faults += _check_ranges(ranges, ledger, proof)
    seen: dict[tuple[str, int], np.ndarray] = {}
    for samples in _blocks(ranges):
        located = data.locate(samples, drawn_from)
        names = np.array(located.sources)
        for name in set(located.sources):
            for epoch in np.unique(located.epochs[names == name]).tolist():
                chosen = located.sequences[(names == name) & (located.epochs == epoch)]
                marks = seen.setdefault((name, epoch), np.zeros(proof.num_sequences[name], np.uint8))
                np.add.at(marks, chosen, 1)
                if marks.max() > 1:
                    twice = int(np.argmax(marks > 1))
                    proof.faults.append(f"sequence {twice} of {name} came twice in epoch {epoch}")
        proof.trained += len(samples)
    first, last = ranges[0].start, ranges[-1].stop
    before, after = counts_before(first, drawn_from), counts_before(last, drawn_from)
    left_out = _left_out(ledger, data, first, last)
    for (name, epoch), marks in sorted(seen.items()):
        size = proof.num_sequences[name]
        proof.epochs.setdefault(name, {})[epoch] = int(marks.sum())
        is_whole = before[name] <= epoch * size and (epoch + 1) * size <= after[name]
        missing = size - int((marks > 0).sum()) - left_out.get((name, epoch), 0)
        if is_whole and missing:
            proof.faults.append(f"{missing} sequences of {name} are missing from epoch {epoch}")
    return proof


def _check_ranges(ranges: Sequence[range], ledger: Ledger, proof: Proof) -> Iterator[str]:
    """Check that between two steps only samples that a guard has left out are missing."""
    refused = {number for first, end in ledger.skipped for number in range(first, end)}
    proof.left_out = sum(number in range(ranges[0].start, ranges[-1].stop) for number in refused)
    for number, (before, after) in enumerate(pairwise(ranges), proof.first_step):
        if after.start < before.stop:
            yield f"samples {after.start} to {before.stop - 1} came in step {number} and in step {number + 1}"
        lost = [sample for sample in range(before.stop, after.start) if sample not in refused]
        if lost:
            yield f"{len(lost)} samples from {lost[0]} on came in no step, between {number} and {number + 1}"
    for number, samples in enumerate(ranges, proof.first_step):
        if refused & set(samples):
            yield f"step {number} holds samples that were to be left out"


def _blocks(ranges: Sequence[range]) -> Iterator[np.ndarray]:
    """Yield the samples of the steps, int64, in blocks that bound memory."""
    block: list[np.ndarray] = []
    for samples in ranges:
        block.append(np.arange(samples.start, samples.stop, dtype=np.int64))
        if sum(map(len, block)) >= SAMPLES_AT_A_TIME:
            yield np.concatenate(block)
            block = []
    if block:
        yield np.concatenate(block)


def _left_out(ledger: Ledger, data: TrainingData, first: int, last: int) -> dict[tuple[str, int], int]:
    """Return {(source, epoch): samples that a guard has left out}."""
    counts: dict[tuple[str, int], int] = {}
    for start, end in ledger.skipped:
        samples = np.arange(max(start, first), min(end, last), dtype=np.int64)
        if len(samples):
            located = data.locate(samples, blends(ledger.history))
            for place in zip(located.sources, located.epochs.tolist(), strict=True):
                counts[place] = counts.get(place, 0) + 1
    return counts


def contradictions(
    ledger: Ledger,
    rows: Sequence[Mapping[str, Any]],
    histories: Mapping[str, History],
    first_step: int = 1,
) -> list[str]:
    """List the differences between the ledger and what the run wrote at the time.

    That is training rows of metrics.jsonl, and the histories in its checkpoints, by their names.

    first_step: of this run directory; not 1 where it continues from the checkpoint of another.
    """
    found = []
    steps = [row["step"] for row in rows]
    if steps != list(range(first_step, first_step + len(steps))):
        found.append(f"metrics.jsonl does not hold every step from {first_step} on once")
    for row in rows:
        stop = samples_of_step(ledger.history, row["step"]).stop
        expected = {"consumed_samples": consumed_samples(stop, ledger.skipped)}
        if len(by_source := consumed_by_source(ledger.history, stop, ledger.skipped)) > 1:
            expected |= {
                f"consumed_tokens/{name}": count * ledger.seq_length for name, count in by_source.items()
            }
        found += [
            f"step {row['step']} had {name} {row[name]:,} in metrics.jsonl; the ledger says {value:,}"
            for name, value in expected.items()
            if name in row and row[name] != value
        ]
    for name, history in histories.items():
        if history != ledger.history[: len(history)]:
            found.append(f"{name} was written under another history")
    return found

"""Training sequences of one split by their number: the tokens they hold, and of which documents."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from distllm.config.problems import user_error
from distllm.config.schema import Sequences as Settings
from distllm.data.cache import build_once, digest
from distllm.data.file_array import FileArray
from distllm.data.packing import pack
from distllm.data.prepared import PreparedSource, Split
from distllm.data.token_stream import TokenStream

FORMAT_VERSION = 1  # of packings in the cache


@dataclass(frozen=True)
class Samples:
    """Sequences as a model takes them; inputs are all tokens but the last, labels all but the first.

    tokens: int64 [n, seq + 1].
    loss_weights: float32 [n, seq] of the labels, 0 for padding and for a label that its document does not
        lead to; None means that all count.
    document_starts: int32 [documents + 1], where in the flattened [n * seq] inputs each document begins, and
        the end; None without a document mask.
    """

    tokens: np.ndarray
    loss_weights: np.ndarray | None = None
    document_starts: np.ndarray | None = None


@dataclass(frozen=True)
class Span:
    """Tokens start to stop - 1 of the stream of documents, in a sequence."""

    start: int
    stop: int


class Sequences(ABC):
    """The sequences of one split. All of them together use every label once."""

    num_sequences: int
    holds_padding: bool

    def __init__(self, stream: TokenStream, seq_length: int, document_mask: bool, padding: int) -> None:
        self.stream = stream
        self.seq_length = seq_length
        self.document_mask = document_mask
        self.padding = padding

    @abstractmethod
    def spans(self, sequence: int) -> list[Span]:
        """Return the spans of a sequence, in order, without padding; at most seq_length + 1 tokens."""

    def document_spans(self, sequence: int) -> list[Span]:
        """Return the spans of a sequence, cut where a document begins: each lies within one document."""
        return [part for span in self.spans(sequence) for part in self._cut(span)]

    def read(self, sequences: np.ndarray) -> Samples:
        """Read sequences by their numbers. sequences: [n] numbers below num_sequences."""
        return gather([(self, sequence) for sequence in sequences.tolist()])

    def fill(self, sequence: int, tokens: np.ndarray, loss_weights: np.ndarray | None) -> list[int]:
        """Write a sequence into `tokens` [seq + 1] and `loss_weights` [seq], which are all padding and all 1.

        Returns the inputs at which documents begin; padding counts as a document of its own.
        """
        parts = self.document_spans(sequence) if self.document_mask else self.spans(sequence)
        begins, end = [], 0
        for part in parts:
            begins.append(end)
            end += part.stop - part.start
            tokens[begins[-1] : end] = self.stream.read(part.start, part.stop)
        if loss_weights is not None:
            loss_weights[end - 1 :] = 0  # labels from `end` on are padding
            if self.document_mask:
                # The first token of a document cannot be predicted from that document.
                loss_weights[[begin - 1 for begin in begins[1:]]] = 0
        return [begin for begin in (*begins, end) if begin < self.seq_length]

    def _cut(self, span: Span) -> list[Span]:
        starts = [start for start in self.stream.starts_between(span.start, span.stop) if start > span.start]
        edges = [span.start, *map(int, starts), span.stop]
        return [Span(start, stop) for start, stop in pairwise(edges)]


class ChunkedSequences(Sequences):
    """The stream of all documents, cut every seq_length tokens, across documents.

    Each sequence takes one more token, the first of the next, as its last label. A remainder at the end is
    not used.
    """

    holds_padding = False

    def __init__(self, stream: TokenStream, seq_length: int, document_mask: bool, padding: int) -> None:
        super().__init__(stream, seq_length, document_mask, padding)
        self.num_sequences = max(0, (stream.num_tokens - 1) // seq_length)

    def spans(self, sequence: int) -> list[Span]:
        start = sequence * self.seq_length
        return [Span(start, start + self.seq_length + 1)]


class PackedSequences(Sequences):
    """Whole documents and pieces of long ones, packed by best fit (packing.py); read from `folder`."""

    holds_padding = True

    def __init__(
        self, stream: TokenStream, seq_length: int, document_mask: bool, padding: int, folder: Path
    ) -> None:
        super().__init__(stream, seq_length, document_mask, padding)
        self._starts = FileArray(folder / "starts.bin", np.int64)
        self._lengths = FileArray(folder / "lengths.bin", np.int32)
        self._first_pieces = FileArray(folder / "first_pieces.bin", np.int64)
        self.num_sequences = len(self._first_pieces) - 1

    def spans(self, sequence: int) -> list[Span]:
        first, end = self._first_pieces.read(sequence, sequence + 2).tolist()
        starts, lengths = self._starts.read(first, end).tolist(), self._lengths.read(first, end).tolist()
        return [Span(start, start + length) for start, length in zip(starts, lengths, strict=True)]

    def document_spans(self, sequence: int) -> list[Span]:
        return self.spans(sequence)  # each was cut out of one document


def gather(rows: list[tuple[Sequences, int]]) -> Samples:
    """Read sequences, each given with the `Sequences` that it belongs to; all of one job, so of one shape."""
    first = rows[0][0]
    tokens = np.full((len(rows), first.seq_length + 1), first.padding, np.int64)
    is_weighed = first.holds_padding or first.document_mask
    loss_weights = np.ones((len(rows), first.seq_length), np.float32) if is_weighed else None
    starts: list[int] = []
    for row, (sequences, number) in enumerate(rows):
        begins = sequences.fill(number, tokens[row], None if loss_weights is None else loss_weights[row])
        starts += [row * first.seq_length + begin for begin in begins]
    starts.append(len(rows) * first.seq_length)
    return Samples(tokens, loss_weights, np.array(starts, np.int32) if first.document_mask else None)


def open_sequences(
    source: PreparedSource,
    split: Split,
    settings: Settings,
    seq_length: int,
    end_of_document: int,
    cache: Path,
    report: Callable[[str], None],
) -> Sequences:
    """Return the sequences of a split of `source`; a packing comes from the cache, or is made now.

    User error: there is not one sequence.
    """
    stream = TokenStream(split.prefix, split.first_document, split.num_documents)
    sequences: Sequences
    if settings.packing == "best_fit":
        folder = _packing_folder(source, split, seq_length, cache)
        manifest = build_once(
            folder, lambda unfinished: _write_packing(stream, seq_length, unfinished), report
        )
        report(_summary(f"{source.name} {split.prefix.name}", manifest))
        sequences = PackedSequences(stream, seq_length, settings.document_mask, end_of_document, folder)
    else:
        sequences = ChunkedSequences(stream, seq_length, settings.document_mask, end_of_document)
    if sequences.num_sequences < 1:
        kind = f"the {split.prefix.name} documents of source {source.name}"
        rule = f"one sequence needs {seq_length + 1} tokens; {kind} have {stream.num_tokens}"
        fix = "a shorter sequence, or more data (for validation: a larger data.validation_fraction)"
        raise user_error("model.seq_length", seq_length, rule, fix)
    return sequences


def _packing_folder(source: PreparedSource, split: Split, seq_length: int, cache: Path) -> Path:
    key = {
        "format": FORMAT_VERSION,
        "tokens": source.fingerprint,
        "split": [split.prefix.name, split.first_document, split.num_documents],
        "seq_length": seq_length,
    }
    return cache / f"packing-{digest(json.dumps(key, sort_keys=True).encode())}"


def _write_packing(stream: TokenStream, seq_length: int, folder: Path) -> dict[str, Any]:
    packing = pack(stream.offsets(0, stream.num_documents + 1), seq_length)
    packing.starts.astype("<i8").tofile(folder / "starts.bin")
    packing.lengths.astype("<i4").tofile(folder / "lengths.bin")
    packing.first_pieces.astype("<i8").tofile(folder / "first_pieces.bin")
    num_used = int(packing.lengths.sum(dtype=np.int64))
    padding = 1 - num_used / max(packing.num_sequences * (seq_length + 1), 1)
    return {
        "num_documents": stream.num_documents,
        "num_sequences": packing.num_sequences,
        "padding_fraction": padding,
        "num_cut_documents": packing.num_cut,
        "num_documents_without_label": packing.num_labelless,
    }


def _summary(name: str, packing: Mapping[str, Any]) -> str:
    text = (
        f"{name}: {packing['num_documents']:,} documents packed into {packing['num_sequences']:,} sequences, "
        f"{packing['padding_fraction']:.2%} padding; {packing['num_cut_documents']:,} cut, "
        "all longer than a sequence"
    )
    if packing["num_documents_without_label"]:
        text += f"; {packing['num_documents_without_label']:,} of one token left out"
    return text

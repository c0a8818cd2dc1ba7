"""Best-fit packing: which pieces of documents share a training sequence (Ding et al. 2024, arXiv:2404.10830).

A document is cut only where it is longer than a sequence. Pieces of equal length are interchangeable, so what
is packed is how many there are of each length, not the pieces one by one (as Krell et al. 2021,
arXiv:2107.02027): the time does not grow with the number of documents, and the result is that of best-fit
decreasing, longest piece first into the fullest sequence that still takes it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """Sequences of at most seq_length + 1 tokens, the last of which is only a label.

    starts: int64 [pieces], first token of each piece in the stream of documents. lengths: int32 [pieces], 2
    to seq_length + 1 tokens. first_pieces: int64 [sequences + 1], which pieces a sequence holds.
    num_cut: documents that were longer than a sequence. num_labelless: documents of one token, left out.
    """

    starts: np.ndarray
    lengths: np.ndarray
    first_pieces: np.ndarray
    num_cut: int
    num_labelless: int

    @property
    def num_sequences(self) -> int:
        return len(self.first_pieces) - 1


def pack(document_offsets: np.ndarray, seq_length: int) -> Packing:
    """Pack documents into sequences.

    document_offsets: int64 [documents + 1], first token of each document, and the end.
    """
    window = seq_length + 1
    starts, lengths = _pieces(document_offsets, seq_length)
    num_of_length = np.bincount(lengths, minlength=window + 1)
    by_length = np.argsort(lengths, kind="stable")  # pieces of one length stay in the order of the documents
    next_of_length = np.concatenate([[0], np.cumsum(num_of_length)])[:-1]  # in by_length
    pieces: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for contents, num_sequences in _best_fit_decreasing(num_of_length, window):
        # [num_sequences, pieces of one sequence]
        chosen = []
        for length in contents:
            first = next_of_length[length]
            chosen.append(by_length[first : first + num_sequences])
            next_of_length[length] += num_sequences
        pieces.append(np.stack(chosen, axis=1).ravel())
        counts.append(np.full(num_sequences, len(contents), np.int64))
    order = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    document_lengths = np.diff(document_offsets)
    return Packing(
        starts[order],
        lengths[order].astype(np.int32),
        np.concatenate([[0], np.cumsum(np.concatenate(counts))]) if counts else np.zeros(1, np.int64),
        num_cut=int((document_lengths > window).sum()),
        num_labelless=int((document_lengths == 1).sum()),
    )


def _pieces(document_offsets: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (first token, length) of every piece, in order.

    Pieces of one document share a token: the last label of one is the first input of the next, so that every
    token but a document's first is a label once.
    """
    document_lengths = np.diff(document_offsets)
    num_pieces = -(-np.maximum(document_lengths - 1, 0) // seq_length)
    documents = np.repeat(np.arange(len(document_lengths)), num_pieces)
    firsts = np.concatenate([[0], np.cumsum(num_pieces)])[:-1]
    within = (np.arange(len(documents)) - firsts[documents]) * seq_length
    lengths = np.minimum(document_lengths[documents] - within, seq_length + 1)
    return document_offsets[documents] + within, lengths


def _best_fit_decreasing(num_of_length: np.ndarray, window: int) -> list[tuple[tuple[int, ...], int]]:
    """Return [(lengths of the pieces of a sequence, number of such sequences)]."""
    open_sequences: dict[int, Counter[tuple[int, ...]]] = {}  # by the room that is left
    closed: Counter[tuple[int, ...]] = Counter()
    has_room = np.zeros(window + 1, bool)  # whether any open sequence still takes so many tokens

    def put(contents: tuple[int, ...], free: int, count: int) -> None:
        if free < 2:  # no piece is as short
            closed[contents] += count
            return
        open_sequences.setdefault(free, Counter())[contents] += count
        has_room[free] = True

    for length in range(window, 1, -1):
        left = int(num_of_length[length])
        while left:
            free = _smallest(has_room, length)
            if free is None:
                # New sequences, each filled with as many pieces as fit: then it is the fullest that takes the
                # next.
                times = min(window // length, left)
                count = left // times
                put((length,) * times, window - length * times, count)
                left -= count * times
                continue
            kinds = open_sequences[free]
            contents, available = next(iter(kinds.items()))
            times = min(free // length, left)
            count = min(available, left // times)
            kinds[contents] -= count
            if not kinds[contents]:
                del kinds[contents]
            if not kinds:
                del open_sequences[free]
                has_room[free] = False
            put(contents + (length,) * times, free - length * times, count)
            left -= count * times
    for kinds in open_sequences.values():
        closed.update(kinds)
    return list(closed.items())


def _smallest(has_room: np.ndarray, length: int) -> int | None:
    """Return the least room of at least `length` tokens that a sequence has."""
    found = int(np.argmax(has_room[length:])) + length
    return found if has_room[found] else None

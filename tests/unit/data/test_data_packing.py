"""Best-fit packing: every label once, no needless cut, and as few sequences as best-fit decreasing needs."""

from __future__ import annotations

import bisect
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.data.packing import Packing, pack

lengths = st.lists(st.integers(1, 60), max_size=80)


def offsets(document_lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(document_lengths)]).astype(np.int64)


def best_fit_decreasing(piece_lengths: list[int], window: int) -> int:
    """The number of sequences, packed piece by piece as the paper does."""
    rooms: list[int] = []
    num_sequences = 0
    for length in sorted(piece_lengths, reverse=True):
        fullest = bisect.bisect_left(rooms, length)
        if fullest == len(rooms):
            num_sequences += 1
            room = window
        else:
            room = rooms.pop(fullest)
        bisect.insort(rooms, room - length)
    return num_sequences


def sequences(packing: Packing) -> list[list[tuple[int, int]]]:
    """[(first token, length) of every piece] of every sequence."""
    pieces = list(zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True))
    edges = packing.first_pieces.tolist()
    return [pieces[edges[i] : edges[i + 1]] for i in range(packing.num_sequences)]


@given(document_lengths=lengths, seq_length=st.integers(1, 20))
def test_every_label_comes_once(document_lengths: list[int], seq_length: int) -> None:
    packing = pack(offsets(document_lengths), seq_length)
    labels = [
        token
        for sequence in sequences(packing)
        for start, length in sequence
        for token in range(start + 1, start + length)
    ]
    edges = offsets(document_lengths).tolist()
    expected = [token for first, end in pairwise(edges) for token in range(first + 1, end)]
    assert sorted(labels) == expected
    assert all(sum(length for _, length in sequence) <= seq_length + 1 for sequence in sequences(packing))


@given(document_lengths=lengths, seq_length=st.integers(1, 20))
def test_only_what_is_too_long_is_cut(document_lengths: list[int], seq_length: int) -> None:
    packing = pack(offsets(document_lengths), seq_length)
    starts = set(packing.starts.tolist())
    edges = offsets(document_lengths)
    for first, length in zip(edges.tolist(), document_lengths, strict=False):
        inside = [start for start in starts if first < start < first + length]
        assert bool(inside) == (length > seq_length + 1)
    assert packing.num_cut == sum(length > seq_length + 1 for length in document_lengths)
    assert packing.num_labelless == document_lengths.count(1)


@given(document_lengths=lengths, seq_length=st.integers(1, 20))
def test_it_is_best_fit_decreasing(document_lengths: list[int], seq_length: int) -> None:
    packing = pack(offsets(document_lengths), seq_length)
    assert packing.num_sequences == best_fit_decreasing(packing.lengths.tolist(), seq_length + 1)


@pytest.mark.parametrize("document_lengths", [[], [1], [1, 1]])
def test_nothing_to_pack(document_lengths: list[int]) -> None:
    packing = pack(offsets(document_lengths), 8)
    assert (packing.num_sequences, packing.first_pieces.tolist()) == (0, [0])


def test_the_reference_is_right() -> None:
    """5 and 4 share a sequence of 9, so do 3, 3 and 3; 2 needs a third."""
    assert best_fit_decreasing([5, 4, 3, 3, 3, 2], 9) == 3
    assert best_fit_decreasing([9, 9], 9) == 2


def test_real_lengths_leave_little_padding() -> None:
    """Log-normal lengths, as of web pages; chunks would cut nearly every second document here."""
    document_lengths = np.random.default_rng(0).lognormal(6, 1.2, 200_000).astype(np.int64) + 2
    packing = pack(offsets(document_lengths.tolist()), 2048)
    padding = 1 - packing.lengths.sum() / (packing.num_sequences * 2049)
    assert padding < 1e-3

"""Sequences of chunks and packings: their tokens, weights and document starts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.config.problems import UserError
from distllm.config.schema import Sequences as Settings
from distllm.data.indexed import TokenWriter
from distllm.data.prepared import PreparedSource, Split
from distllm.data.sequences import Sequences, open_sequences

PADDING = 0


def write(folder: Path, lengths: list[int]) -> PreparedSource:
    """Documents whose tokens are their place in the stream, from 1 on: a token tells where it comes from."""
    edges = np.concatenate([[1], 1 + np.cumsum(lengths)]).tolist()
    writer = TokenWriter(folder / "train", 70_000)
    for first, end in pairwise(edges):
        writer.add(np.arange(first, end))
    writer.finish()
    split = Split(folder / "train", len(lengths), sum(lengths), None, edges[-1] - 1)
    return PreparedSource("made", folder, split, None, f"{lengths}")


def opened(
    source: PreparedSource, seq_length: int, packing: str, document_mask: bool, split: Split | None = None
) -> Sequences:
    chosen = Settings(packing=packing, document_mask=document_mask, prefetch=0)  # type: ignore[arg-type]
    cache = source.folder / "cache"
    return open_sequences(
        source, split or source.train, chosen, seq_length, PADDING, cache, report=lambda _: None
    )


def test_chunks_cross_documents_and_share_one_token(tmp_path: Path) -> None:
    sequences = opened(write(tmp_path, [5, 1, 2, 95]), 8, "chunk", document_mask=False)
    assert sequences.num_sequences == 12
    samples = sequences.read(np.arange(12))
    assert samples.tokens.tolist() == [list(range(i * 8 + 1, i * 8 + 10)) for i in range(12)]
    assert (samples.tokens.dtype, samples.loss_weights, samples.document_starts) == (np.int64, None, None)


@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(9, 1), (16, 1), (17, 2)])
def test_the_last_sequence_needs_its_label(tmp_path: Path, num_tokens: int, num_sequences: int) -> None:
    assert opened(write(tmp_path, [num_tokens]), 8, "chunk", False).num_sequences == num_sequences


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_too_few_tokens_are_a_user_error(tmp_path: Path, packing: str) -> None:
    source = write(tmp_path, [1, 1, 1])
    with pytest.raises(UserError, match="one sequence needs 9 tokens; the train documents of source made"):
        opened(source, 8, packing, False)


def test_a_masked_chunk_knows_its_documents(tmp_path: Path) -> None:
    """Documents begin at tokens 5, 6, 8, 20 and 24 of the stream, counted from 0."""
    sequences = opened(write(tmp_path, [5, 1, 2, 12, 4, 30]), 8, "chunk", document_mask=True)
    samples = sequences.read(np.array([0, 1, 2]))
    assert samples.document_starts is not None
    assert samples.document_starts.tolist() == [0, 5, 6, 8, 16, 20, 24]
    assert samples.loss_weights is not None
    no_label = [np.flatnonzero(row == 0).tolist() for row in samples.loss_weights]
    # The label of each document's last token would be the first of the next.
    assert no_label == [[4, 5, 7], [], [3, 7]]


def test_packed_sequences_are_padded_and_weighed(tmp_path: Path) -> None:
    sequences = opened(write(tmp_path, [5, 3, 20, 7]), 8, "best_fit", document_mask=True)
    samples = sequences.read(np.arange(sequences.num_sequences))
    rows = {tuple(row) for row in samples.tokens.tolist()}
    assert rows == {
        tuple(range(9, 18)),  # two whole windows of the long document; they share token 17
        tuple(range(17, 26)),
        (29, 30, 31, 32, 33, 34, 35, PADDING, PADDING),
        (1, 2, 3, 4, 5, 25, 26, 27, 28),
        (6, 7, 8, *[PADDING] * 6),
    }
    assert samples.loss_weights is not None
    weights = {
        row[0]: weight.tolist() for row, weight in zip(samples.tokens, samples.loss_weights, strict=True)
    }
    assert weights[9] == weights[17] == [1] * 8
    assert weights[29] == [1] * 6 + [0, 0]
    assert weights[1] == [1, 1, 1, 1, 0, 1, 1, 1]
    assert weights[6] == [1, 1, 0, 0, 0, 0, 0, 0]


def test_without_a_mask_a_packing_only_leaves_out_its_padding(tmp_path: Path) -> None:
    sequences = opened(write(tmp_path, [5, 4, 7]), 8, "best_fit", document_mask=False)
    samples = sequences.read(np.arange(sequences.num_sequences))
    assert samples.document_starts is None
    assert samples.loss_weights is not None
    assert sorted(samples.loss_weights.sum(1).tolist()) == [6, 8]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda found: sum(found) > 12),
    seq_length=st.integers(2, 10),
    packing=st.sampled_from(["chunk", "best_fit"]),
)
def test_pieces_lie_in_one_document_and_make_up_the_tokens(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int, packing: str
) -> None:
    source = write(tmp_path_factory.mktemp("source"), lengths)
    try:
        sequences = opened(source, seq_length, packing, document_mask=True)
    except UserError:
        assert packing == "best_fit", "a chunk needs no document of two tokens"
        assert max(lengths) == 1
        return
    edges = np.concatenate([[0], np.cumsum(lengths)])
    for sequence in range(sequences.num_sequences):
        samples = sequences.read(np.array([sequence]))
        assert samples.loss_weights is not None
        assert samples.document_starts is not None
        begin, weights, starts = 0, np.zeros(seq_length), []
        for span in sequences.document_spans(sequence):
            first = np.searchsorted(edges, span.start, side="right")
            assert first == np.searchsorted(edges, span.stop - 1, side="right"), "in one document"
            end = begin + span.stop - span.start
            assert samples.tokens[0, begin:end].tolist() == list(range(span.start + 1, span.stop + 1))
            weights[begin : end - 1] = 1
            starts.append(begin)
            begin = end
        assert samples.tokens[0, begin:].tolist() == [PADDING] * (seq_length + 1 - begin)
        assert samples.loss_weights[0].tolist() == weights.tolist()
        starts = [start for start in [*starts, begin] if start < seq_length]
        assert samples.document_starts.tolist() == [*starts, seq_length]


def test_a_split_may_be_a_range_of_documents(tmp_path: Path) -> None:
    """As the validation split of a pair of files that another tool made."""
    source = write(tmp_path, [5, 10, 12, 6])
    split = Split(source.train.prefix, 2, 18, None, 33, first_document=2, first_token=15)
    sequences = opened(source, 8, "chunk", True, split)
    samples = sequences.read(np.array([0, 1]))
    assert samples.tokens[:, 0].tolist() == [16, 24]
    assert samples.document_starts is not None
    assert samples.document_starts.tolist() == [0, 8, 12, 16]
    packed = opened(source, 8, "best_fit", True, split)
    assert packed.read(np.arange(packed.num_sequences)).tokens.max() == 33


def test_a_packing_is_made_once_and_told(tmp_path: Path) -> None:
    source = write(tmp_path, [5, 3, 20, 7])
    told: list[str] = []
    chosen = Settings(packing="best_fit", document_mask=True, prefetch=0)
    for _ in range(2):
        open_sequences(source, source.train, chosen, 8, PADDING, tmp_path / "cache", told.append)
    figures = "4 documents packed into 5 sequences, 17.78% padding; 1 cut, all longer than a sequence"
    assert told == [f"made train: {figures}"] * 2, "every start tells"
    assert len(list((tmp_path / "cache").glob("packing-*[!k]"))) == 1

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.config.problems import UserError
from distllm.data.indexed import TokenWriter
from distllm.data.loader import Batches, microbatch_samples
from distllm.data.prepared import Split

SEQ_LENGTH = 8
NUM_TOKENS = 103  # 12 sequences, the last label taken from the 97th token, 6 tokens over


def write(prefix: Path, num_tokens: int) -> Split:
    """Token i of the stream has id i, so a sequence tells where it comes from."""
    writer = TokenWriter(prefix, num_tokens)
    for document in np.split(np.arange(num_tokens), [5, 6, 8]):
        writer.add(document)
    writer.finish()
    return Split(prefix, writer.num_documents, writer.num_tokens, num_bytes=0, max_token=writer.max_token)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return write(tmp_path_factory.mktemp("split") / "train", NUM_TOKENS)


def test_chunks_cross_documents_and_share_one_token(split: Split) -> None:
    batches = Batches(split, SEQ_LENGTH, seed=0, shuffle=False)
    assert batches.num_sequences == 12
    samples = batches.samples(0, 12)
    assert (samples.shape, samples.dtype) == ((12, SEQ_LENGTH + 1), np.int64)
    assert samples.tolist() == [list(range(i * 8, i * 8 + 9)) for i in range(12)]
    assert batches.samples(12, 1).tolist() == samples[:1].tolist(), "then from the start again"


@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(9, 1), (16, 1), (17, 2)])
def test_the_last_sequence_needs_its_label(tmp_path: Path, num_tokens: int, num_sequences: int) -> None:
    batches = Batches(write(tmp_path / "x", num_tokens), SEQ_LENGTH, seed=0)
    assert batches.num_sequences == num_sequences
    assert batches.samples(0, num_sequences).max() == 8 * num_sequences


def test_shuffled_epochs_hold_every_sequence_once(split: Split) -> None:
    batches = Batches(split, SEQ_LENGTH, seed=5)
    epochs = [batches.samples(12 * epoch, 12) for epoch in range(3)]
    firsts = [(epoch[:, 0] // SEQ_LENGTH).tolist() for epoch in epochs]
    assert all(sorted(first) == list(range(12)) for first in firsts)
    assert firsts[0] != firsts[1] != firsts[2]
    assert all(np.array_equal(np.diff(epoch), np.ones((12, SEQ_LENGTH))) for epoch in epochs)
    assert firsts[0] != (Batches(split, SEQ_LENGTH, seed=6).samples(0, 12)[:, 0] // SEQ_LENGTH).tolist()


def test_samples_are_a_pure_function_of_their_number(split: Split) -> None:
    whole = Batches(split, SEQ_LENGTH, seed=5).samples(0, 40)
    batches = Batches(split, SEQ_LENGTH, seed=5)
    for first, count in [(30, 10), (3, 1), (11, 14)]:
        assert np.array_equal(batches.samples(first, count), whole[first : first + count])


def test_too_few_tokens(split: Split) -> None:
    assert Batches(split, NUM_TOKENS - 1, seed=0).num_sequences == 1
    with pytest.raises(UserError) as error:
        Batches(split, NUM_TOKENS, seed=0)
    assert "model.seq_length=103" in str(error.value)
    assert "needs 104 tokens; the train split has 103" in str(error.value)


@given(
    first=st.integers(min_value=0, max_value=10**12),
    micro_batch_size=st.integers(min_value=1, max_value=8),
    num_microbatches=st.integers(min_value=1, max_value=6),
    dp_size=st.integers(min_value=1, max_value=16),
)
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(
    first: int, micro_batch_size: int, num_microbatches: int, dp_size: int
) -> None:
    global_batch_size = micro_batch_size * num_microbatches * dp_size
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "dp_size": dp_size}
    read = [
        sample
        for rank in range(dp_size)
        for microbatch in range(num_microbatches)
        for sample in microbatch_samples(first, microbatch, rank, **sizes)
    ]
    assert sorted(read) == list(range(first, first + global_batch_size))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_microbatches_of_all_ranks_are_the_global_batch(split: Split, dp_size: int) -> None:
    batches = Batches(split, SEQ_LENGTH, seed=1)
    read = [
        sequence.tolist()
        for rank in range(dp_size)
        for tokens in batches.microbatches(24, rank, global_batch_size=8, micro_batch_size=2, dp_size=dp_size)
        for sequence in tokens
    ]
    assert sorted(read) == sorted(batches.samples(24, 8).tolist())


def test_impossible_microbatches_are_refused() -> None:
    with pytest.raises(AssertionError, match="global batch of 10"):
        microbatch_samples(0, 0, 0, global_batch_size=10, micro_batch_size=2, dp_size=2)
    with pytest.raises(AssertionError, match="rank 2 of 2"):
        microbatch_samples(0, 0, 2, global_batch_size=8, micro_batch_size=2, dp_size=2)
    with pytest.raises(AssertionError, match="no microbatch 2"):
        microbatch_samples(0, 2, 0, global_batch_size=8, micro_batch_size=2, dp_size=2)

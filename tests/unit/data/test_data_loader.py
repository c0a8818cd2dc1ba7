"""What a rank reads is a function of seed, mixture and data: not of ranks, nor of what was read before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_sequences import opened, write

from distllm.config.problems import UserError
from distllm.data.loader import StepShape, TrainingData, TrainingSource
from distllm.data.mixture import Blend
from distllm.data.order import Order

SEQ_LENGTH = 8
PHASES = [Blend(0, {"a": 2, "b": 1}), Blend(30, {"a": 1, "b": 1}), Blend(70, {"a": 1, "b": 0})]


def make_data(
    folder: Path, packing: str = "chunk", document_mask: bool = False, max_epochs: int | None = None
) -> TrainingData:
    sources = {}
    for name, lengths in {"a": [30, 50, 20, 13], "b": [41, 7, 60]}.items():
        (folder / name).mkdir(exist_ok=True)
        sequences = opened(write(folder / name, lengths), SEQ_LENGTH, packing, document_mask)
        sources[name] = TrainingSource(sequences, Order(5, name), max_epochs)
    return TrainingData(sources)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return make_data(tmp_path_factory.mktemp("sources"))


def test_each_epoch_of_a_source_holds_its_sequences_once(data: TrainingData) -> None:
    located = data.locate(np.arange(200), PHASES)
    for name in "ab":
        mine = [row for row, source in enumerate(located.sources) if source == name]
        size = data.sources[name].sequences.num_sequences
        epochs = [located.sequences[mine[i : i + size]].tolist() for i in range(0, len(mine) - size, size)]
        assert len(epochs) >= 2, "the test must see more than one epoch"
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert located.epochs[mine].tolist() == [i // size for i in range(len(mine))]


@given(first=st.integers(0, 150), dp_size=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 3]))
def test_a_step_is_the_same_for_any_number_of_ranks(
    data: TrainingData, first: int, dp_size: int, micro: int
) -> None:
    shape = StepShape(global_batch_size=24, micro_batch_size=micro, dp_size=dp_size)
    alone = data.read(range(first, first + 24), PHASES).tokens
    ranks = [data.microbatches(first, PHASES, rank, shape) for rank in range(dp_size)]
    together = [ranks[rank][i].tokens for i in range(shape.num_microbatches) for rank in range(dp_size)]
    assert np.array_equal(np.concatenate(together), alone)


@settings(max_examples=25)
@given(starts=st.lists(st.integers(0, 150), min_size=1, max_size=5))
def test_a_sample_is_a_function_of_its_number(data: TrainingData, starts: list[int]) -> None:
    whole = data.read(range(160), PHASES).tokens
    for start in starts:  # in any order, as after a rewind
        assert np.array_equal(data.read(range(start, start + 10), PHASES).tokens, whole[start : start + 10])


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
def test_weights_and_document_starts_go_along(tmp_path: Path, packing: str) -> None:
    data = make_data(tmp_path, packing, document_mask=True)
    located = data.locate(np.arange(10, 16), PHASES)
    samples = data.read(range(10, 16), PHASES)
    assert samples.loss_weights is not None
    assert samples.document_starts is not None
    expected_starts = []
    for row, name in enumerate(located.sources):
        alone = data.sources[name].sequences.read(located.sequences[row : row + 1])
        assert alone.loss_weights is not None
        assert alone.document_starts is not None
        assert np.array_equal(samples.tokens[row], alone.tokens[0])
        assert np.array_equal(samples.loss_weights[row], alone.loss_weights[0])
        expected_starts += (alone.document_starts[:-1] + row * SEQ_LENGTH).tolist()
    assert samples.document_starts.tolist() == [*expected_starts, 6 * SEQ_LENGTH]
    assert samples.document_starts.dtype == np.int32


def test_the_last_epoch_that_is_allowed(tmp_path: Path) -> None:
    data = make_data(tmp_path, max_epochs=2)
    blends = [Blend(0, {"a": 1, "b": 0})]
    size = data.sources["a"].sequences.num_sequences
    data.locate(np.arange(2 * size), blends)
    with pytest.raises(UserError, match="would be seen more often at sample 28"):
        data.locate(np.arange(2 * size + 1), blends)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(AssertionError, match="must refuse a global batch of 10 on 2 ranks x 2"):
        StepShape(10, 2, 2)
    shape = StepShape(8, 2, 2)
    assert shape.num_microbatches == 2
    with pytest.raises(AssertionError, match="rank 2 of 2"):
        shape.samples(0, 0, 2)
    with pytest.raises(AssertionError, match="no microbatch 2"):
        shape.samples(0, 2, 0)


@given(
    micro=st.integers(1, 4),
    dp_size=st.integers(1, 5),
    microbatches=st.integers(1, 4),
    first=st.integers(0, 10**12),
)
def test_a_step_reads_each_of_its_samples_once(
    micro: int, dp_size: int, microbatches: int, first: int
) -> None:
    batch = micro * dp_size * microbatches
    shape = StepShape(batch, micro, dp_size)
    samples = [
        sample
        for microbatch in range(microbatches)
        for rank in range(dp_size)
        for sample in shape.samples(first, microbatch, rank)
    ]
    assert samples == list(range(first, first + batch))

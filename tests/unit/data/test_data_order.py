from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.data.order import epoch_key, permuted_index, permuted_indices, sequence_number, sequence_numbers

KEYS = st.integers(min_value=0, max_value=2**64 - 1)
SEEDS = st.integers(min_value=0, max_value=2**32 - 1)


@settings(deadline=None)
@given(size=st.integers(min_value=1, max_value=5000), key=KEYS)
def test_bijection(size: int, key: int) -> None:
    assert sorted(permuted_indices(np.arange(size), size, key)) == list(range(size))


@given(size=st.integers(min_value=1, max_value=2**40), key=KEYS, data=st.data())
def test_huge_ranges_and_scalars(size: int, key: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(min_value=0, max_value=size - 1), unique=True, min_size=1))
    indices = permuted_indices(np.array(positions), size, key)
    assert len(set(indices.tolist())) == len(positions)
    assert indices.min() >= 0
    assert indices.max() < size
    assert permuted_index(positions[0], size, key) == indices[0]


def test_golden_order_never_changes() -> None:
    """A run that resumes under a later version must go on with the same data."""
    assert permuted_indices(np.arange(10), 10, 7).tolist() == [5, 9, 7, 2, 1, 4, 6, 8, 0, 3]
    assert [sequence_number(sample, 10, 1234) for sample in range(8, 12)] == [(0, 3), (0, 5), (1, 4), (1, 7)]


@settings(deadline=None)
@given(
    first=st.integers(min_value=0, max_value=10**6),
    count=st.integers(min_value=1, max_value=60),
    num_sequences=st.integers(min_value=1, max_value=40),
    seed=SEEDS,
)
def test_array_of_sequences_is_the_scalar_one(first: int, count: int, num_sequences: int, seed: int) -> None:
    expected = [sequence_number(sample, num_sequences, seed)[1] for sample in range(first, first + count)]
    assert sequence_numbers(first, count, num_sequences, seed).tolist() == expected


def test_each_epoch_visits_everything_in_an_order_of_its_own() -> None:
    size = 1000
    epochs = [sequence_numbers(epoch * size, size, size, seed=1) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(size))
    others = [*epochs[1:], sequence_numbers(0, size, size, seed=2)]
    for order in others:
        assert np.mean(order == epochs[0]) < 0.01, "two orders agree by chance in 1 of 1000 places"
    assert sequence_number(2 * size, size, 1) == (2, epochs[2][0])


@given(SEEDS, SEEDS, SEEDS, SEEDS)
def test_keys_of_seeds_and_epochs_do_not_collide(seed: int, epoch: int, seed_2: int, epoch_2: int) -> None:
    assert (epoch_key(seed, epoch) == epoch_key(seed_2, epoch_2)) == ((seed, epoch) == (seed_2, epoch_2))


@pytest.mark.parametrize("size", [1000, 1024, 31409, 65537])
def test_well_shuffled(size: int) -> None:
    """What holds for a random order, each bound five standard deviations wide."""
    order = permuted_indices(np.arange(size), size, key=3).astype(float)
    positions = np.arange(size)
    deviations = 5 / np.sqrt(size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < deviations
    assert abs(np.corrcoef(order, positions)[0, 1]) < deviations
    # The mean distance of two random points of a range is a third of it, with a deviation below a quarter.
    assert abs(np.mean(np.abs(order - positions)) / size - 1 / 3) < deviations / 4
    # Each tenth of the order holds members of each tenth of the range, a hundredth of the size each.
    counts = np.histogram2d(positions, order, bins=10)[0]
    assert np.all(np.abs(counts - size / 100) < 5 * np.sqrt(size / 100) + 1)


def test_small_ranges_take_every_order() -> None:
    orders = {tuple(permuted_indices(np.arange(4), 4, key)) for key in range(2000)}
    assert len(orders) == 24


def test_positions_outside_of_the_range_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"range\(5\)"):
        permuted_index(5, 5, 0)
    with pytest.raises(AssertionError, match=r"range\(0\)"):
        permuted_index(0, 0, 0)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.data.order import Order, permuted_index, permuted_indices, sequence_numbers

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
    assert permuted_indices(np.arange(10), 10, 7).tolist() == [9, 8, 5, 2, 3, 6, 1, 7, 0, 4]
    order = Order(1234, "web")
    assert one_epoch(10, order, 0) == [7, 5, 4, 0, 6, 2, 9, 3, 8, 1]


def one_epoch(size: int, order: Order, epoch: int) -> list[int]:
    return sequence_numbers(np.full(size, epoch), np.arange(size), size, order).tolist()


@settings(deadline=None)
@given(
    samples=st.lists(st.integers(min_value=0, max_value=10**6), min_size=1, max_size=60),
    num_sequences=st.integers(min_value=1, max_value=40),
    seed=SEEDS,
)
def test_an_array_of_sequences_is_one_by_one(samples: list[int], num_sequences: int, seed: int) -> None:
    order = Order(seed, "source")
    epochs, positions = np.divmod(np.array(samples), num_sequences)
    together = sequence_numbers(epochs, positions, num_sequences, order)
    alone = [
        permuted_index(position, num_sequences, order.key(epoch))
        for epoch, position in zip(epochs.tolist(), positions.tolist(), strict=True)
    ]
    assert together.tolist() == alone


def test_each_epoch_visits_everything_in_an_order_of_its_own() -> None:
    size = 1000
    orders = [one_epoch(size, Order(1, "a"), epoch) for epoch in range(3)]
    orders += [one_epoch(size, Order(2, "a"), 0), one_epoch(size, Order(1, "b"), 0)]
    for order in orders:
        assert sorted(order) == list(range(size))
    for other in orders[1:]:
        same = np.mean(np.array(other) == np.array(orders[0]))
        assert same < 0.01, "two orders agree by chance in 1 of 1000 places"


def test_without_a_shuffle_every_epoch_goes_in_order() -> None:
    order = Order(1, "a", shuffle=False)
    assert one_epoch(7, order, 0) == one_epoch(7, order, 5) == list(range(7))


@given(SEEDS, SEEDS, SEEDS, SEEDS)
def test_keys_of_seeds_and_epochs_do_not_collide(seed: int, epoch: int, seed_2: int, epoch_2: int) -> None:
    equal = Order(seed, "a").key(epoch) == Order(seed_2, "a").key(epoch_2)
    assert equal == ((seed, epoch) == (seed_2, epoch_2))


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

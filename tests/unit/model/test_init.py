"""Initial values of a part are those of the whole: each is a function of seed, name and its number alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distllm.layout.place import Box
from distllm.model.init import ELEMENTS_AT_ONCE, draw_normal, runs


def drawn(start: int, number: int, seed: int = 1, name: str = "weight") -> NDArray[np.float32]:
    out = np.empty(number, np.float32)
    draw_normal(seed, name, start, out)
    return out


WHOLE = drawn(0, 3 * ELEMENTS_AT_ONCE)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 2 * ELEMENTS_AT_ONCE))
def test_a_range_is_that_of_the_whole(start: int, number: int) -> None:
    expected = WHOLE[start : start + number]
    assert (drawn(start, len(expected)) == expected).all()


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return shape, Box(offsets, sizes)


@given(boxes())
def test_runs_are_the_elements_of_a_box_in_order(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    inside = numbers[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
    found = [number for start, stop in runs(shape, box) for number in range(start, stop)]
    assert found == inside.reshape(-1).tolist()


def test_a_whole_array_is_one_run() -> None:
    assert list(runs((4, 6), Box((0, 0), (4, 6)))) == [(0, 24)]
    assert list(runs((4, 6), Box((1, 0), (2, 6)))) == [(6, 18)]


def test_other_seeds_and_names_give_other_values() -> None:
    for other in (drawn(0, 4096, seed=2), drawn(0, 4096, name="bias")):
        # Two of 65,536 values are equal by chance once in 65,536 pairs.
        assert (other == WHOLE[:4096]).mean() < 0.01
        assert abs(np.corrcoef(other, WHOLE[:4096])[0, 1]) < 5 / math.sqrt(4096)


def test_the_distribution_is_the_standard_normal() -> None:
    """Within five standard errors of n draws; quantiles of the normal distribution by its tables."""
    n = len(WHOLE)
    assert abs(WHOLE.mean()) < 5 / math.sqrt(n)
    assert WHOLE.std() == pytest.approx(1, abs=5 / math.sqrt(2 * n))
    for bound, share in ((1.0, 0.6827), (1.96, 0.9500), (3.0, 0.9973)):
        error = 5 * math.sqrt(share * (1 - share) / n)
        assert (np.abs(WHOLE) < bound).mean() == pytest.approx(share, abs=error + 1e-4)
    neighbours = np.corrcoef(WHOLE[:-1], WHOLE[1:])[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_the_values_of_a_seed_are_those_of_every_machine() -> None:
    """Written down once: with others a job of the same seed would start from other weights."""
    values = drawn(5, 6, seed=1234, name="decoder.layers.0.mlp.linear_fc1.weight")
    assert values.tolist() == pytest.approx(
        [1.114023, -0.044976, 0.373983, 0.150481, 0.763696, -0.939184], abs=1e-6
    )

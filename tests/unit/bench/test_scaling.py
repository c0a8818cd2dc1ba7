"""Growth with the number of ranks is told from a few points."""

import math

import pytest

from distllm.bench.scaling import fit

RANKS = (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("growth", "values"),
    [
        ("1", [7.0] * 5),
        ("log n", [3 + 2 * math.log2(n) for n in RANKS]),
        ("n", [41.0 + 16 * n for n in RANKS]),
    ],
)
def test_each_growth_is_recognised_and_extrapolated(growth: str, values: list[float]) -> None:
    found = fit(RANKS, values)
    assert found.growth == growth
    assert [found.at(n) for n in RANKS] == pytest.approx(values)
    at_large = {"1": 7.0, "log n": 3 + 2 * 14, "n": 41 + 16 * 16_384}
    assert found.at(16_384) == pytest.approx(at_large[growth])


def test_noise_around_a_constant_is_no_growth() -> None:
    assert fit(RANKS, [1.0, 1.2, 0.9, 1.15, 0.95]).growth == "1"


def test_what_shrinks_does_not_grow() -> None:
    assert fit(RANKS, [16.0, 8.0, 4.0, 2.0, 1.0]).growth == "1"


def test_two_points_are_refused() -> None:
    with pytest.raises(AssertionError, match="three points"):
        fit((1, 2), [1.0, 2.0])

"""Which source a sample is drawn from: exact, countable, and the same however it is asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.data.mixture import Blend, counts_before, draw

weights = st.dictionaries(
    st.sampled_from("abcdef"), st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=6
).filter(lambda chosen: sum(chosen.values()) > 1e-3)


@st.composite
def blend_lists(drawing: st.DrawFn) -> list[Blend]:
    firsts = sorted(drawing(st.sets(st.integers(1, 3000), max_size=4)))
    return [Blend(first, drawing(weights)) for first in (0, *firsts)]


@given(blends=blend_lists(), num_samples=st.integers(1, 4000))
def test_every_source_gives_its_samples_in_a_row(blends: list[Blend], num_samples: int) -> None:
    """No sample of a source is missing and none comes twice, over any changes of the mixture."""
    draws = draw(np.arange(num_samples), blends)
    for number, name in enumerate(draws.names):
        mine = draws.source_samples[draws.sources == number]
        assert mine.tolist() == list(range(len(mine)))
        assert counts_before(num_samples, blends)[name] == len(mine)


@given(blends=blend_lists(), samples=st.lists(st.integers(0, 2**62), min_size=1, max_size=40))
def test_a_sample_is_a_function_of_its_number_alone(blends: list[Blend], samples: list[int]) -> None:
    """Whatever it is asked together with: no rank, worker or restart matters."""
    together = draw(np.array(samples), blends)
    for row, sample in enumerate(samples):
        alone = draw(np.array([sample]), blends)
        assert (alone.sources[0], alone.source_samples[0]) == (
            together.sources[row],
            together.source_samples[row],
        )


@given(blends=blend_lists(), sample=st.integers(0, 2**62))
def test_counts_go_up_by_what_is_drawn(blends: list[Blend], sample: int) -> None:
    before, after = counts_before(sample, blends), counts_before(sample + 1, blends)
    draws = draw(np.array([sample]), blends)
    drawn = draws.names[draws.sources[0]]
    assert after == before | {drawn: before[drawn] + 1}
    assert draws.source_samples[0] == before[drawn]


@given(chosen=weights, start=st.integers(0, 2**40), length=st.integers(1, 5000))
def test_proportions_hold_over_any_window(chosen: dict[str, float], start: int, length: int) -> None:
    """A window is at most 2 * log2(length) even grids, each right to less than two samples. No drift: the
    bound does not grow with `start`. (The last digit of a weight is 2**-32.)"""
    before, after = (counts_before(sample, [Blend(0, chosen)]) for sample in (start, start + length))
    for name, weight in chosen.items():
        share = length * weight / sum(chosen.values())
        assert abs(after[name] - before[name] - share) <= 4 * np.log2(length + 1) + 2


def test_in_practice_a_window_is_right_to_three_samples() -> None:
    chosen = {"a": 1 / 3, "b": 0.41, "c": 0.07, "d": 0.0001}
    draws = draw(np.arange(2**17), [Blend(0, chosen)])
    for number, name in enumerate(draws.names):
        drawn = np.concatenate([[0], np.cumsum(draws.sources == number)])
        for length in (64, 1000, 4096):
            share = length * chosen[name] / sum(chosen.values())
            assert np.abs(drawn[length:] - drawn[:-length] - share).max() < 3


def test_a_weight_of_zero_draws_nothing() -> None:
    blends = [Blend(0, {"a": 0, "b": 1, "c": 0}), Blend(100, {"a": 1, "b": 0, "c": 0})]
    assert counts_before(300, blends) == {"a": 200, "b": 100, "c": 0}


def test_sources_come_and_go() -> None:
    """A source that left and comes back goes on where it was."""
    blends = [Blend(0, {"a": 1, "b": 1}), Blend(100, {"b": 1, "new": 1}), Blend(200, {"a": 1})]
    draws = draw(np.arange(200, 203), blends)
    assert [draws.names[source] for source in draws.sources] == ["a"] * 3
    assert draws.source_samples.tolist() == [50, 51, 52]
    assert counts_before(200, blends) == {"a": 50, "b": 100, "new": 50}


def test_the_order_of_names_does_not_matter() -> None:
    """A dict read back from a file may have another order; the samples are the same."""
    one, other = {"x": 1.0, "a": 2.0, "m": 3.0}, {"m": 3.0, "x": 1.0, "a": 2.0}
    samples = np.arange(500)
    assert np.array_equal(draw(samples, [Blend(0, one)]).sources, draw(samples, [Blend(0, other)]).sources)


def test_the_first_samples_stay_as_they_are() -> None:
    """Another draw would train running jobs on other data after an upgrade."""
    draws = draw(np.arange(12), [Blend(0, {"a": 2, "b": 1, "c": 1})])
    assert "".join(draws.names[source] for source in draws.sources) == "abacabacabac"


def test_a_mixture_begins_with_sample_zero() -> None:
    with pytest.raises(AssertionError, match="begins with sample 0"):
        draw(np.arange(3), [Blend(5, {"a": 1})])

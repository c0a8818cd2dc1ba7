"""A short history tells every step's samples."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.lineage.history import (
    History,
    Stretch,
    blends,
    history_from_plain,
    history_to_plain,
    samples_of_step,
    with_plan,
)

WEIGHTS = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 1.0}]
# (batch size, which weights, samples that are left out before the step)
steps = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 1), st.sampled_from([0, 0, 0, 4, 9])), min_size=1, max_size=40
)


@given(steps)
def test_history_gives_back_what_was_planned(taken: list[tuple[int, int, int]]) -> None:
    history: History = ()
    sample, planned, drawn = 0, [], []
    for step, (batch, weights, left_out) in enumerate(taken):
        sample += left_out if step else 0
        history = with_plan(history, step, sample, batch, WEIGHTS[weights])
        planned.append(range(sample, sample + batch))
        drawn.append((sample, WEIGHTS[weights]))
        sample += batch
    assert [samples_of_step(history, number) for number in range(1, len(taken) + 1)] == planned
    for first, weights_then in drawn:
        blend = [blend for blend in blends(history) if blend.first <= first][-1]
        assert blend.weights == weights_then
    assert history_from_plain(json.loads(json.dumps(history_to_plain(history)))) == history


def test_an_undisturbed_run_is_one_line() -> None:
    history: History = ()
    for step in range(1000):
        history = with_plan(history, step, 8 * step, 8, WEIGHTS[0])
    assert history == (Stretch(0, 0, 8, WEIGHTS[0]),)
    assert samples_of_step(history, 10**6) == range(8 * (10**6 - 1), 8 * 10**6)


def test_a_step_that_was_refused_and_left_out_has_no_samples() -> None:
    """The mixture changed at step 5, whose first samples a guard has left out: they stay drawn from it."""
    history = with_plan((), 0, 0, 8, WEIGHTS[0])
    history = with_plan(history, 5, 40, 8, WEIGHTS[1])
    history = with_plan(history, 5, 48, 8, WEIGHTS[1])
    assert samples_of_step(history, 5) == range(32, 40)
    assert samples_of_step(history, 6) == range(48, 56)
    assert [blend.first for blend in blends(history)] == [0, 40]


def test_steps_count_from_one() -> None:
    with pytest.raises(AssertionError, match="counted from 1"):
        samples_of_step(with_plan((), 0, 0, 8, WEIGHTS[0]), 0)

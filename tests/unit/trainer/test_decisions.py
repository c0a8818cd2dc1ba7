"""What is decided about a step that must not happen."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import make_config

from distllm.config.schema import Fault
from distllm.engine.engine import Limits, StepResult
from distllm.trainer.guards import Action, decide, limits, robust_bound
from distllm.trainer.state import TrainState

SETTINGS: Fault = dataclasses.replace(
    make_config().fault, spike_action="rewind", spike_window=8, max_refused_steps=5, max_rewinds=2
)
BOUNDS = Limits(3.0, 2.0)


def decision(
    result: StepResult, settings: Fault = SETTINGS, refused: int = 0, tries: int = 0, rewinds: int = 0
) -> Action:
    return decide(result, BOUNDS, settings, refused_in_a_row=refused, tries=tries, num_rewinds=rewinds).action


SPIKE = StepResult(2.0, 50.0, is_applied=False)
NAN = StepResult(math.nan, 1.0, is_applied=False)


def test_decisions() -> None:
    assert decision(StepResult(2.0, 1.0)) is Action.COMMIT
    assert decision(NAN) is Action.RETRY
    assert decision(StepResult(2.0, math.nan, is_applied=False)) is Action.RETRY
    assert decision(NAN, tries=1) is Action.SKIP
    assert decision(SPIKE) is Action.REWIND
    assert decision(SPIKE, dataclasses.replace(SETTINGS, spike_action="skip")) is Action.SKIP
    assert decision(SPIKE, rewinds=2) is Action.GIVE_UP
    assert decision(SPIKE, refused=3) is Action.REWIND
    assert decision(SPIKE, refused=4) is Action.GIVE_UP
    assert decision(NAN, refused=4) is Action.GIVE_UP


def test_the_reason_names_what_is_beyond_its_bound() -> None:
    def reason(result: StepResult) -> str:
        return decide(result, BOUNDS, SETTINGS, refused_in_a_row=0, tries=0, num_rewinds=0).reason

    assert reason(SPIKE) == "spike: gradient norm 50 is above 2"
    assert (
        reason(StepResult(4.0, 50.0, is_applied=False))
        == "spike: loss 4 is above 3, gradient norm 50 is above 2"
    )
    assert reason(NAN) == "not finite: loss nan, gradient norm 1.0"


def test_there_is_no_bound_before_the_window_is_full() -> None:
    state = TrainState()
    for _ in range(7):
        state = state.after_step(8, 2.0, 1.0, window=8)
    assert limits(state, SETTINGS) == Limits()
    full = state.after_step(8, 2.0, 1.0, window=8)
    assert limits(full, SETTINGS).loss == pytest.approx(2.0 * (1 + 0.01 * SETTINGS.spike_threshold))
    assert limits(full, dataclasses.replace(SETTINGS, spike_action="off")) == Limits()


@given(st.lists(st.floats(0.1, 10.0), min_size=9, max_size=60), st.floats(1e3, 1e9))
def test_one_outlier_hardly_moves_the_bound(values: list[float], outlier: float) -> None:
    """Among nine or more values, one that is any size leaves the bound within reach of the others' range: a
    mean and a standard deviation would follow it."""
    assert (
        robust_bound([*values, outlier], 6.0)
        <= max(values) + 6.0 * 1.4826 * (max(values) - min(values)) + 0.6
    )


def test_limits_refuse_what_is_no_number() -> None:
    assert Limits().allow(1e30, 1e30)
    for bad in (math.nan, math.inf, -math.inf):
        assert not Limits().allow(bad, 1.0)
        assert not Limits().allow(1.0, bad)
    assert BOUNDS.allow(3.0, 2.0)
    assert not BOUNDS.allow(3.1, 2.0)
    assert not BOUNDS.allow(3.0, 2.1)

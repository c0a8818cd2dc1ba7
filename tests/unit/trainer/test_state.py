"""Where training is, and which samples it passes by."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.data.mixture import draw
from distllm.lineage.history import blends, samples_of_step, with_plan
from distllm.trainer.state import TrainState

WEIGHTS = {"a": 2.0, "b": 1.0}


def go_on(state: TrainState, batch: int, steps: int) -> tuple[TrainState, list[int]]:
    """After some steps, and the samples that they were trained on."""
    trained: list[int] = []
    for _ in range(steps):
        state = state.planned(batch, WEIGHTS)
        trained += state.samples(batch)
        state = state.after_step(batch, loss=1.0, grad_norm=2.0, window=3)
    return state, trained


@given(
    batch=st.integers(1, 8),
    later_batch=st.integers(1, 8),
    faults=st.sets(st.integers(0, 12)),
    rewind=st.integers(0, 6),
)
def test_every_sample_is_trained_on_once_or_skipped_once(
    batch: int, later_batch: int, faults: set[int], rewind: int
) -> None:
    """Steps `faults` are refused; then a rewind to step `rewind` with all that was skipped, and another batch
    size: nothing is seen twice, nothing is lost without being on the list."""
    state, states = TrainState(), [TrainState()]
    for step in range(13):
        state = state.without(state.samples(batch)) if step in faults else go_on(state, batch, 1)[0]
        states.append(state)
    back = states[min(rewind, len(states) - 1)]
    for first, end in state.skipped:
        if (first, end) not in back.skipped:
            back = back.without(range(first, end))
    back = back.for_batch(later_batch)
    begin = back.next_sample
    seen = [n for n in range(begin) if not any(first <= n < end for first, end in back.skipped)]
    end_state, trained = go_on(back, later_batch, 20)
    passed_by = [(first, end) for first, end in end_state.skipped if first < end_state.next_sample]
    skipped = [n for first, end in passed_by for n in range(first, end)]
    assert sorted(seen + trained + skipped) == list(range(end_state.next_sample))
    assert end_state.consumed_samples == len(seen) + len(trained)
    assert sum(end_state.consumed_by_source().values()) == len(seen) + len(trained)
    in_ledger = [n for step in range(1, end_state.step + 1) for n in samples_of_step(end_state.history, step)]
    assert in_ledger == sorted(seen + trained), "the ledger tells the same, step by step"


def test_a_state_survives_json() -> None:
    history = with_plan(with_plan((), 0, 0, 8, WEIGHTS), 1, 16, 12, {"a": 1.0})
    state = TrainState(3, 40, ((8, 16),), (1.0, 2.5), (0.5, 0.25), history)
    assert TrainState.from_plain(json.loads(json.dumps(state.to_plain()))) == state


def test_the_window_keeps_the_last_steps() -> None:
    state = TrainState()
    for loss in (1.0, 2.0, 3.0, 4.0):
        state = state.after_step(8, loss, 10 * loss, window=3)
    assert (state.losses, state.grad_norms) == ((2.0, 3.0, 4.0), (20.0, 30.0, 40.0))


def test_what_each_source_gave() -> None:
    """Two samples of `a` for each of `b`, to within the two of any mixture; six are left out on the way."""
    state = go_on(TrainState(), 6, 2)[0]
    state = state.without(state.samples(6))
    state = go_on(state, 6, 2)[0]
    consumed = state.consumed_by_source()
    assert sum(consumed.values()) == 24
    assert consumed["a"] == pytest.approx(16, abs=2)


@given(batch=st.integers(1, 5), changes=st.sets(st.integers(1, 20), max_size=3), stop=st.integers(0, 20))
def test_a_resume_at_any_step_goes_on_with_the_same_samples(batch: int, changes: set[int], stop: int) -> None:
    """Through the JSON of a checkpoint, at any step of a run whose mixture changes now and then."""

    def run(state: TrainState, until: int) -> tuple[TrainState, list[tuple[str, int]]]:
        drawn: list[tuple[str, int]] = []
        while state.step < until:
            number = sum(change <= state.step for change in changes)
            state = state.planned(batch, {"a": 1.0 + number, "b": 2.0, "c": float(number % 2)})
            samples = np.arange(state.next_sample, state.next_sample + batch)
            draws = draw(samples, blends(state.history))
            names = [draws.names[source] for source in draws.sources]
            drawn += zip(names, draws.source_samples.tolist(), strict=True)
            state = state.after_step(batch, 1.0, 1.0, 8)
        return state, drawn

    end, whole = run(TrainState(), 21)
    stopped, before = run(TrainState(), stop)
    resumed, after = run(TrainState.from_plain(json.loads(json.dumps(stopped.to_plain()))), 21)
    assert before + after == whole
    assert len(set(whole)) == len(whole), "no sample of a source comes twice"
    assert resumed == end

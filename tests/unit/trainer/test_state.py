"""Where training is, and which samples it passes by."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from distllm.trainer.state import TrainState


def go_on(state: TrainState, batch: int, steps: int) -> tuple[TrainState, list[int]]:
    """After some steps, and the samples that they were trained on."""
    trained: list[int] = []
    for _ in range(steps):
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


def test_a_state_survives_json() -> None:
    state = TrainState(3, 40, ((8, 16),), (1.0, 2.5), (0.5, 0.25))
    assert TrainState.from_plain(json.loads(json.dumps(state.to_plain()))) == state


def test_the_window_keeps_the_last_steps() -> None:
    state = TrainState()
    for loss in (1.0, 2.0, 3.0, 4.0):
        state = state.after_step(8, loss, 10 * loss, window=3)
    assert (state.losses, state.grad_norms) == ((2.0, 3.0, 4.0), (20.0, 30.0, 40.0))

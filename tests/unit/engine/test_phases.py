"""Phases are timed side by side, by the clock here; what the schedules call them, and what it costs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from distllm.engine import phases as module
from distllm.engine.phases import Phases, Timings

CPU = torch.device("cpu")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_each_phase_has_the_sum_of_its_spans_and_a_step_ends_it(clock: Clock) -> None:
    phases = Phases(CPU)
    for _ in range(3):
        with phases.phase("forward"):
            clock.now += 2
        clock.now += 100  # between phases
        with phases.phase("backward"):
            clock.now += 4
    timings = phases.end_step()
    assert timings.is_complete
    assert timings.seconds() == {"forward": 6, "backward": 12}
    assert phases.end_step().seconds() == {}


def test_megatrons_names(clock: Clock) -> None:
    phases = Phases(CPU)
    phases.megatron_timers("forward-backward", log_level=1).start(barrier=True)
    for name in ("forward-compute", "backward-compute", "forward-send-backward-recv", "backward-recv"):
        phases.megatron_timers(name, log_level=2).start()
        clock.now += 1
        phases.megatron_timers(name).stop()
    phases.megatron_timers("forward-backward").stop()
    assert phases.end_step().seconds() == {"forward": 1, "backward": 1, "pipeline_wait": 2}
    with pytest.raises(AssertionError, match="all-grads-sync"):
        phases.megatron_timers("all-grads-sync")


def test_a_phase_that_raises_is_closed(clock: Clock) -> None:
    phases = Phases(CPU)

    def fail() -> None:
        with phases.phase("data"):
            clock.now += 1
            raise OSError("no batch")

    with pytest.raises(OSError, match="no batch"):
        fail()
    assert phases.end_step().seconds() == {"data": 1}


class Event:
    """A CUDA event that is passed when the test says so."""

    passed_until = 0.0
    waits = 0

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return self.at <= Event.passed_until

    def synchronize(self) -> None:
        Event.waits += not self.query()
        Event.passed_until = max(Event.passed_until, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "the event has not been passed"
        return 1000 * (end.at - self.at)


def test_events_are_read_when_the_device_has_passed_them() -> None:
    spans: Any = {
        "forward": [(Event(0), Event(2)), (Event(5), Event(6))],
        "optimizer": [(Event(6), Event(9))],
    }
    timings = Timings({"data": 0.5}, spans)
    completed = []
    for passed in (8.0, 9.0):
        Event.passed_until = passed
        completed.append(timings.is_complete)
    assert completed == [False, True]
    assert timings.seconds() == {"data": 0.5, "forward": 3, "optimizer": 3}
    assert Event.waits == 0
    Event.passed_until = 0.0
    assert timings.seconds()["optimizer"] == 3, "who cannot put it off waits"
    assert Event.waits > 0


def test_a_phase_costs_less_than_20_us() -> None:
    """Of the fastest of 20 rounds: others use these cores too."""
    phases = Phases(CPU)

    def round_seconds() -> float:
        began = time.perf_counter()
        for _ in range(200):
            with phases.phase("forward"):
                pass
        phases.end_step()
        return (time.perf_counter() - began) / 200

    assert min(round_seconds() for _ in range(20)) < 20e-6

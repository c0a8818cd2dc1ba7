"""Rows are written in order, as soon as the device has passed what they tell, and no later than asked."""

from __future__ import annotations

from typing import Any, cast

import pytest

from distllm.engine.phases import Timings
from distllm.runtime.activity import Activity
from distllm.trainer.pending_rows import PendingRows


class LateTimings(Timings):
    """Complete when the test says so."""

    is_done = False

    @property
    def is_complete(self) -> bool:
        return self.is_done


class Reporter:
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def training_row(self, row: Any) -> None:
        self.rows.append(row)


def test_a_row_waits_for_its_phases_and_for_those_before_it() -> None:
    reporter: Any = Reporter()
    rows = PendingRows(reporter, Activity())
    first, second, third = LateTimings({"forward": 1.0}), Timings({"forward": 2.0}), Timings({})
    rows.add({"step": 1}, first)
    rows.add({"step": 2}, second)
    assert reporter.rows == []
    first.is_done = True
    rows.add({"step": 3}, third)
    assert reporter.rows == [
        {"step": 1, "forward_seconds": 1.0},
        {"step": 2, "forward_seconds": 2.0},
        {"step": 3},
    ]
    rows.add({"step": 4}, LateTimings({"forward": 4.0}))
    assert len(reporter.rows) == 3
    rows.flush()
    assert reporter.rows[3:] == [{"step": 4, "forward_seconds": 4.0}]
    rows.flush()
    assert len(reporter.rows) == 4


class Event:
    """A fake of a CUDA event that happened at a given millisecond."""

    def __init__(self, milliseconds: float) -> None:
        self.at = milliseconds

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_the_watchdog_is_told_how_long_a_device_worked() -> None:
    """Without waiting for other ranks; on a CPU nothing, since there the stack tells."""

    def spans(*milliseconds: float) -> list[tuple[Any, Any]]:
        return [(Event(1000.0), Event(1000.0 + each)) for each in milliseconds]

    activity, reporter = Activity(), Reporter()
    rows = PendingRows(cast(Any, reporter), activity)
    rows.add({"step": 1}, Timings({"data": 0.25, "forward": 1.0, "backward": 2.0}))
    assert activity.device_seconds == 0
    events = {"forward": spans(100, 150), "backward": spans(500), "optimizer": spans(900)}
    rows.add({"step": 2}, Timings({"data": 0.25}, events | {"pipeline_wait": spans(700)}))
    assert activity.device_seconds == pytest.approx(1.0)
    assert len(reporter.rows) == 2

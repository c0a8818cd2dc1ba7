"""Rows are written in order, as soon as the device has passed what they tell, and no later than asked."""

from __future__ import annotations

from typing import Any

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

"""Every second of a run is somewhere in its account."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from distllm.metrics.goodput import Account, account, describe

BEGIN = 1_800_000_000.0


def at(when: float, kind: str, **fields: Any) -> dict[str, Any]:
    time = datetime.fromtimestamp(BEGIN + when, UTC).isoformat(timespec="milliseconds")
    return {"time": time, "kind": kind, "reason": "", **fields}


def start(
    seconds: float, *, process: float, previous: float | None, lost: tuple[int, float]
) -> dict[str, Any]:
    return at(
        seconds,
        "start",
        process_started=BEGIN + process,
        previous_sign=None if previous is None else BEGIN + previous,
        lost_steps=lost[0],
        lost_seconds=lost[1],
    )


# 100 s: killed at 40 with 2 steps of 3 s after the last checkpoint; 20 s until it is started again; a step of
# 3 s is refused; then a rewind of 1 step.
EVENTS = [
    start(5, process=0, previous=None, lost=(0, 0.0)),
    at(10, "ready", start_up_seconds=10.0),
    at(30, "checkpoint", blocking_seconds=1.0),
    start(65, process=60, previous=40, lost=(2, 6.0)),
    at(68, "ready", start_up_seconds=8.0),
    at(75, "step refused", seconds=3.0),
    at(80, "checkpoint failed", blocking_seconds=2.0),
    at(85, "rewind", lost_steps=1, lost_seconds=3.0),
    at(100, "stop"),
]
ROWS = [{"step": step, "step_seconds": 3.0} for step in range(1, 13)]
ROWS.insert(6, {"step": 6, "validation_loss": 3.0, "validation_seconds": 4.0})


def test_every_second_has_its_place() -> None:
    found = account(EVENTS, ROWS, BEGIN + 100)
    assert found == Account(
        total=100.0,
        productive=36.0,
        start_up=18.0,
        checkpoints=3.0,
        validation=4.0,
        lost=12.0,
        waiting=20.0,
        starts=2,
        steps=12,
        lost_steps=4,
    )
    assert found.other == pytest.approx(7.0)
    assert found.goodput == pytest.approx(0.36)
    text = describe(found)
    assert text.startswith("36.0% of 1m40s were productive")
    assert "waiting       20.0%     20s  between two starts" in text


def test_a_run_that_was_killed_ends_with_its_last_sign() -> None:
    """The last row is newer than the last event."""
    assert account(EVENTS[:3], ROWS[:5], BEGIN + 40).total == pytest.approx(40.0)
    assert account([], [], 0.0).goodput == 0.0

"""The deadline below the interpreter. What a watchdog does to a job: tests/faults/test_hangs.py."""

from __future__ import annotations

import faulthandler
import time
from pathlib import Path
from typing import Any

import pytest

from distllm.runtime import watchdog
from distllm.runtime.activity import Activity
from distllm.runtime.signals import StopRequest


def test_a_deadline_is_set_as_soon_as_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not with the next heartbeat: a thread that keeps the interpreter to itself stops this one before."""
    armed: list[float] = []

    def arm(seconds: float, **_: Any) -> None:
        armed.append(seconds)

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    monkeypatch.setattr(watchdog, "beat_seconds", lambda world_size: 1000.0)
    activity = Activity()
    place = watchdog.Place(tmp_path, watchdog.prepare_folder(tmp_path), 0, 0, 2)
    ignore: Any = lambda *_: None  # noqa: E731
    reports = watchdog.Reports(hang=ignore, failed=ignore, straggler=ignore)
    stop_request = StopRequest()
    guard = watchdog.Watchdog(activity, place, 4.0, 60.0, stop_request, reports)
    guard.start()
    time.sleep(0.5)
    assert not armed, "before the first step there is no deadline"
    activity.begin("train", 1)
    time.sleep(0.5)
    guard.stop()
    stop_request.close()
    assert len(armed) == 1
    assert armed[0] > 4

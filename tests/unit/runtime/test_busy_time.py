"""Busy time is the device's where one has measured it, else that of samples."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.engine.phases import Timings
from distllm.runtime.activity import Activity
from distllm.runtime.busy_time import averaged, busy_seconds


class Event:
    """A fake of a CUDA event that happens at a given millisecond."""

    def __init__(self, milliseconds: float) -> None:
        self.at = milliseconds

    def synchronize(self) -> None:
        return

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def spans(*milliseconds: float) -> list[tuple[Any, Any]]:
    return [(Event(1000.0), Event(1000.0 + each)) for each in milliseconds]


def test_the_device_counts_where_there_is_one() -> None:
    events = {"forward": spans(100, 150), "backward": spans(500), "optimizer": spans(900)}
    on_device = Timings({"data": 0.25}, events | {"pipeline_wait": spans(700)})
    assert on_device.busy_seconds_on_device() == pytest.approx(1.0), "without waiting for other ranks"
    on_host = Timings({"data": 0.25, "forward": 1.0, "backward": 2.0})
    assert on_host.busy_seconds_on_device() is None
    activity = Activity()
    assert busy_seconds(activity.device_seconds, sampled=0.3) == 0.3
    activity.note_device_seconds(1.0)
    assert busy_seconds(activity.device_seconds, sampled=0.3) == 1.0


def test_averages_forget() -> None:
    assert averaged(0.0, 2.0) == 2.0
    assert averaged(2.0, 1.0) == pytest.approx(1.8)

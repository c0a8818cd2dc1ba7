"""Busy time is the device's where one has measured it, else that of samples."""

from __future__ import annotations

import pytest

from distllm.runtime.activity import Activity
from distllm.runtime.busy_time import averaged, busy_seconds


def test_the_device_counts_where_there_is_one() -> None:
    activity = Activity()
    assert busy_seconds(activity.device_seconds, sampled=0.3) == 0.3
    activity.note_device_seconds(1.0)
    assert busy_seconds(activity.device_seconds, sampled=0.3) == 1.0


def test_averages_forget() -> None:
    assert averaged(0.0, 2.0) == 2.0
    assert averaged(2.0, 1.0) == pytest.approx(1.8)

"""What the watchdog reads of the training thread."""

from __future__ import annotations

import math
import time

from distllm.runtime.activity import Activity


def test_patience_ends_with_the_first_step_and_only_steps_are_timed() -> None:
    activity = Activity()
    assert activity.patience_seconds == math.inf
    activity.begin("train", 0)
    assert activity.patience_seconds == 0
    time.sleep(0.05)
    with activity.patient("save", 60):
        assert 0.05 <= activity.step_seconds < 0.2
        assert activity.patience_seconds == 60
        time.sleep(0.2)
    activity.begin("train", 1)
    assert activity.step_seconds < 0.2, "not the save"

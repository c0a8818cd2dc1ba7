"""Rows of training steps, each written once all its values are known, in the order of the steps."""

from __future__ import annotations

from collections import deque

from distllm.engine.phases import Timings, busy_seconds_of
from distllm.metrics.meter import Row
from distllm.runtime.activity import Activity
from distllm.trainer.reporter import Reporter


class PendingRows:
    """Rows whose timings may not be known yet.

    On a GPU the end of an update is known one step later: the host waits for the device only once per step,
    before the update (engine/engine.py), and does not wait for a row.
    """

    def __init__(self, reporter: Reporter, activity: Activity) -> None:
        self._reporter = reporter
        self._activity = activity
        self._waiting: deque[tuple[Row, Timings]] = deque()

    def add(self, row: Row, timings: Timings) -> None:
        self._waiting.append((row, timings))
        while self._waiting and self._waiting[0][1].is_complete:
            self._write_first()

    def flush(self) -> None:
        """Write all rows; the host waits for the device.

        Called before whatever must not come before a row: a validation, a checkpoint (which makes the steps
        before it final), and a rewind (which drops rows).
        """
        while self._waiting:
            self._write_first()

    def _write_first(self) -> None:
        row, timings = self._waiting.popleft()
        seconds_of = timings.seconds()
        phases = {f"{phase}_seconds": seconds for phase, seconds in seconds_of.items()}
        self._reporter.training_row(row | phases)
        if timings.events:
            self._activity.note_device_seconds(busy_seconds_of(seconds_of))

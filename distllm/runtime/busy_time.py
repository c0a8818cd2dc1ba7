"""How long this rank works per step, without waiting for others: who needs longer holds the others up."""

from __future__ import annotations

import time


class BusyTime:
    """Measures seconds per step outside of communication, from samples of the training thread's stack.

    That tells where the host is, which on a CPU is where the work is. See `busy_seconds` for devices.
    """

    def __init__(self) -> None:
        self.per_step = 0.0
        self._step = -1
        self._seconds = 0.0
        self._last = time.monotonic()

    def sample(self, step: int, is_busy: bool) -> None:
        elapsed, self._last = time.monotonic() - self._last, time.monotonic()
        if step != self._step:
            num_steps = max(1, step - self._step)
            if self._step >= 0:
                self.per_step = averaged(self.per_step, self._seconds / num_steps)
            self._step, self._seconds = step, 0.0
        self._seconds += elapsed * is_busy


def averaged(average: float, newest: float) -> float:
    """Return a running average that forgets in about five steps; 0 means there is none so far."""
    return 0.8 * average + 0.2 * newest if average else newest


def busy_seconds(on_device: float, sampled: float) -> float:
    """Return the busy time to report: that of the device, where one has measured any.

    A host that only starts kernels is as fast on a slow device as on a fast one.
    """
    return on_device or sampled

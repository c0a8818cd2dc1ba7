"""Requests to stop: SIGTERM and SIGUSR1 set a flag that the training loop checks.

A Python handler runs in the main thread between two instructions: while that waits inside a collective, it
does not run. So the interpreter is asked to write each signal's number to a pipe, and a thread reads it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LEAST_SECONDS_TO_STOP = 10.0
STEPS_TO_STOP = 3  # the wish is agreed on with the step after the one that runs


class StopRequest:
    """Listens for signals from its construction in the main thread; `close` restores the handlers.

    reason: name of the signal that asked to stop, None so far. seconds_since: it came.
    notify: called once with it, in the listening thread.
    """

    def __init__(self, notify: Callable[[str], None] = lambda reason: None) -> None:
        self.reason: str | None = None
        self._asked_at = 0.0
        self._is_interrupted = False
        self._notify = notify
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def seconds_since(self) -> float | None:
        return time.monotonic() - self._asked_at if self.reason else None

    def check_interrupt(self) -> None:
        """Raise a KeyboardInterrupt that was lost.

        Python prints and ignores one that is raised while a weak reference or an object is finalized.
        """
        if self._is_interrupted:
            raise KeyboardInterrupt

    def close(self) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            number = received[0]
            if number == signal.SIGINT:
                self._is_interrupted = True
            if number in STOP_SIGNALS and self.reason is None:
                self._asked_at = time.monotonic()
                self.reason = signal.Signals(number).name
                self._notify(self.reason)
        os.close(self._reader)


def seconds_to_stop(step_seconds: float, grace_seconds: float) -> float:
    """Return how long a step may show no progress after the signal to stop, before the process ends.

    The wish is heard between two steps. A device that waits for a dead peer never gets there: then the time
    until SIGKILL is lost, since nothing will be saved. step_seconds: of the last step.
    """
    return min(max(LEAST_SECONDS_TO_STOP, STEPS_TO_STOP * step_seconds), grace_seconds)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. SIG_IGN instead would not write to the pipe, and children would inherit it."""

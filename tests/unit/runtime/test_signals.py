"""Signals become wishes, also while the main thread cannot run a handler."""

from __future__ import annotations

import os
import signal
import time

import pytest

from distllm.runtime.signals import StopRequest, seconds_to_stop


def wait_for(request: StopRequest) -> None:
    deadline = time.monotonic() + 5
    while request.reason is None:
        assert time.monotonic() < deadline, "the signal was not seen"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_the_reason(number: signal.Signals) -> None:
    told: list[str] = []
    before = signal.getsignal(number)
    request = StopRequest(told.append)
    try:
        assert request.seconds_since is None
        os.kill(os.getpid(), number)
        wait_for(request)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.05)
        assert (request.reason, told) == (number.name, [number.name])
        assert 0.05 <= (request.seconds_since or 0) < 5, "since the first one"
        request.check_interrupt()
    finally:
        request.close()
    assert signal.getsignal(number) == before


def test_a_stuck_step_has_a_few_step_times_but_never_more_than_the_grace() -> None:
    assert seconds_to_stop(step_seconds=0.1, grace_seconds=30) == 10
    assert seconds_to_stop(step_seconds=6, grace_seconds=30) == 18
    assert seconds_to_stop(step_seconds=60, grace_seconds=30) == 30
    assert seconds_to_stop(step_seconds=0.1, grace_seconds=2) == 2


def test_an_interrupt_that_was_lost_is_raised_again() -> None:
    """As when it comes while an object goes away: Python prints it and goes on."""
    request = StopRequest()
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_wait()
        time.sleep(0.2)  # the listening thread has read it by now
        with pytest.raises(KeyboardInterrupt):
            request.check_interrupt()
        assert request.reason is None
    finally:
        request.close()


def interrupt_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)

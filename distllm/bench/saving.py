"""Time a save or a load, how long it blocks training, and how much it slows training meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

IDLE_SECONDS = 1.0


@dataclass(frozen=True)
class Way:
    """A way to save or load. begin: starts it and returns a function that reports whether it is done."""

    what: str
    begin: Callable[[], Callable[[], bool]]
    is_load: bool = False


@dataclass(frozen=True)
class Timing:
    """The times of one save or load.

    blocking_seconds: for which training stands still.
    speed: of the main thread while the rest is written, 1 is that of an idle process; None where there is no
        rest.
    other_cores: kept busy by other processes meanwhile.
    """

    what: str
    blocking_seconds: float
    seconds: float
    speed: float | None
    other_cores: float


def at_once(work: Callable[[], object]) -> Callable[[], Callable[[], bool]]:
    """Turn `work` into a way that is done when it returns."""

    def begin() -> Callable[[], bool]:
        work()
        return lambda: True

    return begin


def time_way(way: Way) -> Timing:
    """Time one try."""
    idle_speed = speed_until(seconds_from_now(IDLE_SECONDS))
    begin, busy = time.monotonic(), others_cpu_seconds()
    is_done = way.begin()
    blocking, speed = time.monotonic() - begin, None
    if not is_done():
        speed = speed_until(is_done) / idle_speed
    seconds = time.monotonic() - begin
    return Timing(way.what, blocking, seconds, speed, (others_cpu_seconds() - busy) / seconds)


def others_cpu_seconds() -> float:
    """Return other processes' CPU seconds, without the kernel's, which writes what we have written."""
    with open("/proc/stat") as stat:
        user, nice = map(int, stat.readline().split()[1:3])
    return (user + nice) / os.sysconf("SC_CLK_TCK") - os.times().user


def seconds_from_now(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def speed_until(is_done: Callable[[], bool]) -> float:
    """Return products of 256 x 256 matrices per second; `is_done` is called as rarely as training does."""
    matrix, count, begin = torch.rand(256, 256), 0, time.monotonic()
    while not is_done():
        for _ in range(20):
            matrix @ matrix
        count += 20
    return count / (time.monotonic() - begin)


def forget(path: Path) -> None:
    """Take the files below `path` out of the page cache, so that a load reads the disk."""
    os.sync()
    for file in filter(Path.is_file, path.rglob("*")):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

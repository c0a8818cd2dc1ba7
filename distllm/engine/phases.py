"""The time of each phase of a training step, measured without waiting for the device."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.profiler import record_function

PHASES = ("data", "forward", "backward", "pipeline_wait", "optimizer")
BUSY_PHASES = ("data", "forward", "backward")
RANGE_PREFIX = "phase: "  # of the ranges in a profiler's trace
MEGATRON_PHASES = {"forward-compute": "forward", "backward-compute": "backward"}


@dataclass
class Timings:
    """The times of the phases of one step.

    host: seconds of the phases that are timed by the host's clock.
    events: begin and end of each span of the other phases, which the device may not have reached yet.
    """

    host: dict[str, float] = field(default_factory=dict)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Return whether `seconds` would return without waiting for the device.

        The device reaches the events of a stream in order, so the last one would be enough; but which phase's
        that is depends on the schedule.
        """
        return all(spans[-1][1].query() for spans in self.events.values())

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase; wait for the device if it has not reached the last event."""
        on_device = {}
        for phase, spans in self.events.items():
            spans[-1][1].synchronize()
            on_device[phase] = sum(begin.elapsed_time(end) for begin, end in spans) / 1000
        return self.host | on_device


def busy_seconds_of(seconds: Mapping[str, float]) -> float:
    """Return for how long a rank worked, from the seconds of a step's phases.

    Forward and backward passes, and waiting for data, which is the rank's own too. Not pipeline_wait and
    optimizer: there fast ranks wait for slow ones.
    """
    return sum(seconds.get(phase, 0.0) for phase in BUSY_PHASES)


class Phases:
    """Times the phases of one step after another; phases are never nested.

    data: waiting for the batch.
    forward, backward: of all microbatches, with what tensor parallelism and ZeRO communicate meanwhile.
    pipeline_wait: messages between pipeline stages, and waiting for them.
    optimizer: all that follows the schedule: the verdict of the step gate, reductions that are left,
        clipping, the update.

    On a CPU times are taken by the host's clock, on a GPU by events on the current stream, which are read
    when the device has passed them. It is the host that waits for a batch, so `data` is always timed by its
    clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.are_ranges = False  # whether phases are ranges in a profiler's trace, which costs some us each
        self._timings = Timings()
        self._timers: dict[str, _Timer] = {
            name: (_EventTimer if device.type == "cuda" and name != "data" else _HostTimer)(self, name)
            for name in PHASES
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        timer = self._timers[name]
        timer.start()
        try:
            yield
        finally:
            timer.stop()

    def megatron_timers(self, name: str, log_level: int = 0) -> _Timer:
        """Return the timer for what Megatron Core calls `name`.

        Its schedules call `config.timers(name).start()` and `.stop()`. Every schedule (0.16.1,
        pipeline_parallel/schedules.py) times `forward-compute` and `backward-compute`, the passes of each
        microbatch; p2p_communication.py names each message between stages by what it sends and receives;
        `forward-backward` contains all of these, so it is not a phase.
        """
        if name == "forward-backward":
            return _NO_TIMER
        assert name in MEGATRON_PHASES or "send" in name or "recv" in name, f"unknown to Megatron: {name}"
        return self._timers[MEGATRON_PHASES.get(name, "pipeline_wait")]

    def end_step(self) -> Timings:
        """Return the timings of everything since the last call."""
        timings, self._timings = self._timings, Timings()
        return timings


class _Timer:
    """A timer with the interface that Megatron Core expects.

    A pass that raises an exception leaves its timer running; the next `start` begins anew.
    """

    def start(self, barrier: bool = False) -> None:
        pass

    def stop(self, barrier: bool = False) -> None:
        pass


_NO_TIMER = _Timer()


class _RangeTimer(_Timer, ABC):
    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name
        self._range: Any = None

    def start(self, barrier: bool = False) -> None:
        if self.phases.are_ranges:
            self._range = record_function(RANGE_PREFIX + self.name)
            self._range.__enter__()
        self._begin()

    def stop(self, barrier: bool = False) -> None:
        self._end()
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...


class _HostTimer(_RangeTimer):
    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        seconds = time.perf_counter() - self._began
        host = self.phases._timings.host
        host[self.name] = host.get(self.name, 0.0) + seconds


class _EventTimer(_RangeTimer):
    def _begin(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def _end(self) -> None:
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self.phases._timings.events.setdefault(self.name, []).append((self._began, end))

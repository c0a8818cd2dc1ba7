"""Where the time of a training step goes, phase by phase, without ever waiting for the device."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.profiler import record_function

PHASES = ("data", "forward", "backward", "pipeline_wait", "optimizer")
RANGE_PREFIX = "phase: "  # of the ranges in a profiler's trace
MEGATRON_PHASES = {"forward-compute": "forward", "backward-compute": "backward"}


@dataclass
class Timings:
    """The phases of one step. host: seconds that are known. events: beginnings and ends of the others, which
    the device has not passed perhaps."""

    host: dict[str, float] = field(default_factory=dict)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether `seconds` would not wait. Events of one stream are passed in order: the last one tells, but
        which it is depends on the schedule."""
        return all(spans[-1][1].query() for spans in self.events.values())

    def seconds(self) -> dict[str, float]:
        """By phase; waits for the device where it has not come that far."""
        on_device = {}
        for phase, spans in self.events.items():
            spans[-1][1].synchronize()
            on_device[phase] = sum(begin.elapsed_time(end) for begin, end in spans) / 1000
        return self.host | on_device


class Phases:
    """Times the phases of one step after another; they lie side by side, never one inside another.

    data: waiting for the batch. forward, backward: of all microbatches, with what tensor parallelism and ZeRO
    exchange meanwhile. pipeline_wait: messages between stages, and waiting for them. optimizer: all that
    follows the schedule: the verdict, reductions that are left, clipping, the update.

    On a CPU by the clock. On a GPU by events on the current stream, read when the device has passed them.
    Waiting for a batch is the host's: always by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.are_ranges = False  # phases are named in the trace of a profiler, which costs some us each
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
        """What Megatron Core's schedules call as `config.timers(name).start()` and `.stop()`.

        Every schedule (0.16.1, pipeline_parallel/schedules.py) has `forward-compute` and `backward-compute`
        around the passes of each microbatch; p2p_communication.py names each message between stages by what
        it sends and receives; `forward-backward` is around it all, so no phase.
        """
        if name == "forward-backward":
            return _NO_TIMER
        assert name in MEGATRON_PHASES or "send" in name or "recv" in name, f"unknown to Megatron: {name}"
        return self._timers[MEGATRON_PHASES.get(name, "pipeline_wait")]

    def end_step(self) -> Timings:
        """Of all since the last call."""
        timings, self._timings = self._timings, Timings()
        return timings


class _Timer:
    """As Megatron Core wants it. A pass that raises leaves its timer open: the next start begins anew."""

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

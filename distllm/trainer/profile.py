"""`train.profile=START:STOP`: a trace of a few steps for Perfetto or chrome://tracing, and its summary."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from distllm.config.profile import profiled_steps
from distllm.engine.phases import RANGE_PREFIX, Timings
from distllm.metrics.jsonl import write_atomically
from distllm.metrics.profile_summary import Operator, RankProfile, profile_summary, union_seconds
from distllm.trainer.job import Job

STEP_PREFIX = "step "


class StepProfiler:
    """Traces the steps in the window `train.profile`, once per start of the job.

    The first rank of each pipeline stage is traced (the stage's other ranks do the same work). The profiler
    is used as a context manager: however training ends inside, what has been traced is written.

    A start within the window traces the rest of it; after the window, nothing is traced. A step that is
    refused counts as an attempt within the window; a rewind to before the window ends the trace.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._window = profiled_steps(job.config.train.profile)
        self._is_traced = job.groups.is_traced
        self._profiler: profile | None = None
        self._is_begun = self._is_stopped = self._is_written = False
        self._steps: list[tuple[int, float, Timings]] = []

    @property
    def is_active(self) -> bool:
        """Return whether steps are traced now on any rank; equal on all ranks.

        Ranks that are traced slow the others down.
        """
        return self._is_begun and not self._is_stopped

    def before_step(self, step: int) -> None:
        """Start tracing before the first step of the window; stop and write the trace after its last step.

        Collective where it writes. step: number of the next step, counted from 1.
        """
        if self.is_active and step not in self._window:
            self.stop()
            self._write_together()
        if self._is_begun or step not in self._window:
            return
        self._is_begun = True
        if self._is_traced:
            self._profiler = _start_profiler(self._job.runtime.device)
            self._job.engine.phases.are_ranges = True

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Mark the step that the block runs as a range in the trace."""
        if self._profiler is None or not self.is_active:
            yield
            return
        with record_function(f"{STEP_PREFIX}{step}"):
            yield

    def after_step(self, step: int, seconds: float, timings: Timings) -> None:
        """Note the time that the step (or attempt) has taken."""
        if self.is_active:
            self._steps.append((step, seconds, timings))

    def stop(self) -> None:
        """Stop tracing; what has been traced is written later."""
        if not self.is_active:
            return
        self._is_stopped = True
        self._job.engine.phases.are_ranges = False
        if self._profiler:
            self._profiler.stop()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_begun or self._is_written:
            return
        self.stop()
        if error is None:
            self._write_together()
        else:  # other ranks may be gone
            self._tell([found] if (found := self._write_own()) else [])

    def _write_together(self) -> None:
        """Write the traces and the summary; all ranks wait for the slowest.

        Ranks that went on to the next step without the others would seem to hang.
        """
        own = self._write_own()
        self._tell(self._job.runtime.everyone.agree([own] if own else [], operator.add))

    def _write_own(self) -> RankProfile | None:
        """Write this rank's trace; return its measurements, or None if the rank has traced nothing.

        If the trace cannot be written, for example because the disk is full, there is only a warning.
        """
        self._is_written = True
        profiler, self._profiler = self._profiler, None
        if profiler is None or not self._steps:
            return None
        file = self._folder / f"rank_{self._job.runtime.rank}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"partial_{file.name}")  # ends in .gz, which makes the writer compress
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, file)
        except (OSError, RuntimeError) as error:
            self._job.reporter.warn(f"the trace {file} could not be written: {error}")
        return self._measured(profiler)

    @property
    def _recorded(self) -> range:
        """Return the steps that were traced: not the whole window if training began or ended within it."""
        steps = [step for step, _, _ in self._steps]
        return range(min(steps), max(steps) + 1)

    @property
    def _folder(self) -> Path:
        steps = self._recorded
        return self._job.reporter.run.path / "profile" / f"steps_{steps.start}_{steps.stop}"

    def _measured(self, profiler: profile) -> RankProfile:
        phases: dict[str, float] = {}
        for _, _, timings in self._steps:
            for phase, seconds in timings.seconds().items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        events = [event for event in profiler.events() or [] if not _is_range(event.name)]
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        communication = [
            event for event in events if event.name.startswith("gloo:") or "nccl" in event.name.lower()
        ]
        if self._job.runtime.device.type == "cuda" and not kernels:
            self._job.reporter.warn("the profile has no kernels: CUPTI is missing or not permitted")
        if kernels:  # on a GPU, count the time of communication kernels, not of their launches
            communication = [event for event in communication if event.device_type == DeviceType.CUDA]
        return RankProfile(
            rank=self._job.runtime.rank,
            stage=self._job.groups.coordinates.pipeline,
            step_seconds=tuple(seconds for _, seconds, _ in self._steps),
            phases=phases,
            communication_seconds=_union(communication),
            device_seconds=_union(kernels) if kernels else None,
            peak_memory_bytes=self._job.runtime.peak_memory_bytes(),
            operators=_operators(profiler),
        )

    def _tell(self, profiles: list[RankProfile]) -> None:
        if not self._job.runtime.is_main or not profiles:
            return
        steps, folder = self._recorded, self._folder
        try:
            write_atomically(folder / "summary.txt", profile_summary(profiles, steps).encode())
        except OSError as error:
            self._job.reporter.warn(f"the summary of the profile could not be written: {error}")
        which = f"steps {steps.start} to {steps.stop - 1} are profiled"
        ranks = [found.rank for found in profiles]
        self._job.reporter.event("profile", which, step=steps.stop - 1, path=str(folder), ranks=ranks)
        self._job.reporter.progress.note(f"{which}: {folder}")


def _start_profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    profiler.start()
    return profiler


def _is_range(name: str) -> bool:
    """Return whether this is one of our ranges, which contain operators and, on a GPU, kernels."""
    return name.startswith((RANGE_PREFIX, STEP_PREFIX))


def _union(events: Sequence[Any]) -> float:
    """Return the seconds during which at least one event was running; events count in microseconds."""
    return union_seconds((event.time_range.start, event.time_range.end) for event in events) / 1e6


def _operators(profiler: profile) -> tuple[Operator, ...]:
    """Return the operators that take any time by themselves.

    Ranges of annotations are left out, since they only repeat what is inside.
    """
    return tuple(
        Operator(
            average.key,
            average.count,
            average.self_cpu_time_total / 1e6,
            average.self_device_time_total / 1e6,
        )
        for average in profiler.key_averages()
        if not average.is_user_annotation
        and not _is_range(average.key)
        and (average.self_cpu_time_total > 0 or average.self_device_time_total > 0)
    )

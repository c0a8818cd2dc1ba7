"""What is observed of a step: its time, its trace if one is asked for, and its row of metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from distllm.engine.engine import StepResult
from distllm.engine.phases import Timings
from distllm.engine.schedule import learning_rate
from distllm.metrics.meter import Row, training_row
from distllm.trainer.job import Job
from distllm.trainer.pending_rows import PendingRows
from distllm.trainer.profile import StepProfiler
from distllm.trainer.state import TrainState


class StepObserver:
    """The one observer of the training loop.

    It is used as a context manager: however training ends inside, what has been traced is written.

    seconds: time that the last step, or attempt at one, took.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._profiler = StepProfiler(job)
        self._rows = PendingRows(job.reporter, job.activity)
        self._timings = Timings()
        self._seconds_between_steps: Row = {}
        self.seconds = 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Observe the step, or attempt at one, that the block runs. number: counted from 1."""
        self._profiler.before_step(number)
        began = time.perf_counter()
        with self._profiler.step(number):
            yield
        self.seconds = time.perf_counter() - began
        self._timings = self._job.engine.phases.end_step()
        self._profiler.after_step(number, self.seconds, self._timings)

    @contextmanager
    def between_steps(self, field: str) -> Iterator[None]:
        """Observe work during which training waits; the next row has its seconds as `field`."""
        began = time.perf_counter()
        yield
        self._seconds_between_steps[field] = time.perf_counter() - began

    def write_row(self, before: TrainState, after: TrainState, result: StepResult) -> None:
        """Write the row of the step that led from `before` to `after`, as soon as its timings are known."""
        job, config = self._job, self._job.config
        row = training_row(
            step=after.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate_of(job, before),
            consumed_samples=after.consumed_samples,
            consumed_by_source=after.consumed_by_source() if len(job.data.records) > 1 else {},
            step_seconds=self.seconds,
            global_batch_size=config.train.global_batch_size,
            seq_length=config.model.seq_length,
            flops_per_token=job.flops_per_token,
            peak_flops=job.peak_flops,
            peak_memory_bytes=job.runtime.peak_memory_bytes(),
        )
        row |= {"checkpoint_seconds": 0.0} | self._seconds_between_steps
        self._seconds_between_steps = {}
        self._rows.add(row | ({"profiled": True} if self._profiler.is_active else {}), self._timings)

    def flush(self) -> None:
        """Wait for the device and write all pending rows; see PendingRows.flush."""
        self._rows.flush()

    def finish(self) -> None:
        """Stop tracing and write the pending rows, after the last step."""
        self._profiler.stop()
        self.flush()

    def __enter__(self) -> StepObserver:
        self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profiler.__exit__(kind, error, trace)


def rate_of(job: Job, state: TrainState) -> float:
    """Return the learning rate of the step that follows `state`."""
    config = job.config
    return learning_rate(
        state.step, peak=config.optimizer.lr, total_steps=config.train.steps, schedule=config.schedule
    )

"""What a run reports to its user and its run directory. Rank 0 writes; calls on other ranks do nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distllm.config.compose import to_plain
from distllm.config.schema import Config
from distllm.metrics.jsonl import PatientLines
from distllm.metrics.meter import Row
from distllm.metrics.progress import make_progress
from distllm.metrics.run_directory import RunDirectory, State, event_row
from distllm.metrics.sinks import LostWork, MetricsWriter


class Reporter:
    """Progress, metrics, status and events of one run."""

    def __init__(self, config: Config, is_main: bool, first_step: int) -> None:
        self.is_main = is_main
        self.run = RunDirectory(Path(config.run.dir), create=False)
        self.last_training_row: Row | None = None
        self.last_validation_row: Row | None = None
        self._events = PatientLines(self.run.events_path, self.warn)
        self.progress = make_progress(
            config.logging.progress if is_main else "none",
            total_steps=config.train.steps,
            first_step=first_step,
            interval=config.logging.interval,
        )
        self._writer = None
        if is_main:
            self._writer = MetricsWriter(
                self.run,
                tensorboard=config.logging.tensorboard,
                wandb=config.logging.wandb,
                wandb_project=config.logging.wandb_project,
                config=to_plain(config),
                resume_step=first_step,
                warn=self.warn,
            )

    def training_row(self, row: Row) -> None:
        self.last_training_row = row
        if self._writer:
            self._writer.write(row)
            self.progress.update(row)

    def validation_row(self, row: Row) -> None:
        self.last_validation_row = row
        if self._writer:
            self._writer.write(row)
            loss, bits = row.get("validation_loss", math.nan), row.get("validation_bits_per_byte", math.nan)
            self.progress.note(
                f"step {row['step']}: validation {loss:.4f} nats per token, {bits:.4f} bits per byte"
            )

    def rewind(self, step: int) -> LostWork:
        """Note that training goes back to the state after `step` updates; return the work that is lost."""
        return self._writer.rewind(step) if self._writer else LostWork()

    @property
    def lost_work(self) -> LostWork:
        """Return the steps of an earlier start that this one does again."""
        return self._writer.lost_work if self._writer else LostWork()

    def event(self, kind: str, reason: str, **fields: object) -> None:
        if self.is_main:
            self._events.append(event_row(kind, reason, **fields))

    def status(self, state: State, reason: str, **fields: object) -> None:
        if self.is_main:
            try:
                self.run.write_status(state, reason, **fields)
            except OSError as error:
                self.warn(f"status.json could not be written: {error}")

    def warn(self, text: str) -> None:
        if self.is_main:
            self.progress.note(f"WARNING: {text}")

    def hang(self, diagnosis: str, step: int, file: Path) -> None:
        """Report a hang, before the process ends.

        Called from the watchdog's thread, on the first rank that is alive, whichever that is.
        """
        with suppress(OSError):
            self.run.event("hang", diagnosis, step=step, file=str(file))
            self.run.write_status("failed", f"hang: {diagnosis}", step=step)
        print(f"distllm: {diagnosis}: {file}", flush=True)

    def failed(self, reason: str, step: int) -> None:
        """Report what ends the run. Called on the rank that knows it first, whichever that is."""
        with suppress(OSError):
            self.run.write_status("failed", reason, step=step)
        with suppress(OSError):
            self.run.event("stop", reason, step=step)

    def straggler(self, rank: int, facts: Mapping[str, Any]) -> None:
        self.event("straggler", f"rank {rank} holds the others up", rank=rank, **facts)
        self.warn(f"rank {rank} on {facts['host']} is slow: {facts['times_the_median']} x the median")

    def say(self, text: str) -> None:
        """Print text for the user on standard output, outside of the progress display."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        self.progress.close()
        if self._writer:
            self._writer.close()


def report_progress(text: str) -> None:
    """Print a line about what happens before training, on standard error."""
    print(text, file=sys.stderr, flush=True)

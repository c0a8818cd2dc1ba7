"""What a run tells its user and its folder. Rank 0 writes; on other ranks the same calls do nothing."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

from distllm.config.schema import Config
from distllm.metrics.meter import Row
from distllm.metrics.progress import make_progress
from distllm.metrics.run_directory import RunDirectory, State
from distllm.metrics.sinks import MetricsWriter


class Reporter:
    """Progress, metrics, status and events of one run."""

    def __init__(self, config: Config, is_main: bool, first_step: int) -> None:
        self.is_main = is_main
        self.run = RunDirectory(Path(config.run.dir), create=is_main)
        self.last_training_row: Row | None = None
        self.last_validation_row: Row | None = None
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
                config=dataclasses.asdict(config),
                resume_step=first_step,
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

    def event(self, kind: str, reason: str, **fields: object) -> None:
        if self.is_main:
            self.run.event(kind, reason, **fields)

    def status(self, state: State, reason: str, **fields: object) -> None:
        if self.is_main:
            self.run.write_status(state, reason, **fields)

    def say(self, text: str) -> None:
        """Text for the user, on standard output, outside of the progress display."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        self.progress.close()
        if self._writer:
            self._writer.close()


def report_progress(text: str) -> None:
    """A line about what happens before training, on standard error."""
    print(text, file=sys.stderr, flush=True)

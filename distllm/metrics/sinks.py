"""The destinations of rows: `metrics.jsonl` always, TensorBoard and W&B on request. Rank 0 only."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.problems import user_error
from distllm.metrics.event_file import EventFile
from distllm.metrics.jsonl import PatientLines, dump_line, load_line, write_atomically
from distllm.metrics.run_directory import RunDirectory


class MetricsWriter:
    """Writes every row to all sinks; after a resume each step is in them once.

    resume_step: updates that the loaded checkpoint holds; 0 when training starts from scratch, which drops
        every earlier row. Call before the first new row.
    config: the resolved configuration, for W&B.
    warn: called with a message when the disk is full; training continues.
    lost_work: what was dropped.

    Raises a user error when W&B is requested but not installed, or `metrics.jsonl` is damaged.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        tensorboard: bool,
        wandb: bool,
        wandb_project: str,
        config: dict[str, Any],
        resume_step: int,
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._rows = PatientLines(run.metrics_path, warn)
        start_wandb = require_wandb() if wandb else None  # fails before any row is dropped
        self.lost_work = drop_rows_after(run.metrics_path, resume_step)
        self._run = run
        self._event_file = EventFile(run.tensorboard_path, resume_step) if tensorboard else None
        self._wandb_run = None
        if start_wandb:
            self._wandb_run = start_wandb(
                project=wandb_project,
                id=_wandb_run_id(run.wandb_id_path, resume_step),
                resume="allow",
                name=run.path.resolve().name,
                dir=str(run.path),
                config=config,
            )

    def write(self, row: Mapping[str, float | int]) -> None:
        """Write one training or validation row; it must have `step`. Visible to readers when this returns."""
        self._rows.append(row)
        step, scalars = int(row["step"]), {tag(name): row[name] for name in row if name != "step"}
        self._write_event(scalars, step)
        if self._wandb_run:
            # W&B rejects steps that it has seen: after a rewind it keeps the first value of each.
            self._wandb_run.log(scalars, step=step)

    def rewind(self, step: int) -> LostWork:
        """Drop the rows after `step`, to which training returns."""
        self._rows.flush()
        lost = drop_rows_after(self._run.metrics_path, step)
        if self._event_file:
            self._event_file.close()
            self._event_file = EventFile(self._run.tensorboard_path, step)
        return lost

    def _write_event(self, scalars: Mapping[str, float], step: int) -> None:
        """Write to TensorBoard's file, which only repeats metrics.jsonl: a disk error closes it."""
        if self._event_file:
            try:
                self._event_file.write(scalars, step)
            except OSError as error:
                self._event_file = None
                self._warn(f"{error}; TensorBoard's curves end at step {step}, metrics.jsonl continues")

    def close(self) -> None:
        """Close the sinks; a second call does nothing. OSError where waiting rows cannot be written."""
        self._rows.flush()
        if self._event_file:
            self._event_file.close()
        if self._wandb_run:
            self._wandb_run.finish()
        self._event_file = self._wandb_run = None


def tag(name: str) -> str:
    """Return the name of a row's value in TensorBoard and W&B: `train/loss`, `validation/bits_per_byte`."""
    prefix = "validation_"
    return f"validation/{name.removeprefix(prefix)}" if name.startswith(prefix) else f"train/{name}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of a `metrics.jsonl`, NaN and infinity as written; none when there is no file.

    A last line truncated by a kill is left out; any other damage is a user error naming the line.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(load_line(line))
        except ValueError as error:
            if number < len(lines):
                rule = f"line {number} of {path} must be a JSON object ({error})"
                raise user_error("run.dir", path.parent, rule, f"repair or delete line {number}") from error
    return rows


@dataclass(frozen=True)
class LostWork:
    """Steps that are repeated, and the seconds that they took."""

    steps: int = 0
    seconds: float = 0.0


def drop_rows_after(path: Path, resume_step: int) -> LostWork:
    """Rewrite `path` atomically without the rows after `resume_step` and without a truncated last line."""
    if not path.exists():
        return LostWork()
    rows = read_rows(path)
    kept = [row for row in rows if resume_step > 0 and row["step"] <= resume_step]
    write_atomically(path, b"".join(map(dump_line, kept)))
    seconds = [row["step_seconds"] for row in rows[len(kept) :] if "step_seconds" in row]
    return LostWork(len(seconds), sum(seconds))


def require_wandb() -> Any:
    """Return `wandb.init`; a user error when W&B is not installed. Also checked before a job starts."""
    try:
        # Not `import wandb`: where it is not installed, a folder ./wandb of earlier runs would be imported
        # instead.
        from wandb import init
    except ImportError as error:
        rule = "needs the package wandb, which is not installed"
        fix = "pip install 'distllm[wandb]', or logging.wandb=false"
        raise user_error("logging.wandb", "true", rule, fix) from error
    return init


def _wandb_run_id(path: Path, resume_step: int) -> str:
    """Return the id of the W&B run to continue; a new one when training starts from scratch."""
    if resume_step > 0 and path.exists():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex[:8]
    write_atomically(path, f"{run_id}\n".encode())
    return run_id

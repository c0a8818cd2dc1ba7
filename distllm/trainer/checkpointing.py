"""What a run saves for its next start, and when."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distllm import __version__
from distllm.checkpoint.async_writer import Outcome, Saver
from distllm.checkpoint.retention import checkpoint_path, remove_old
from distllm.checkpoint.store import Contents
from distllm.config.compose import to_plain
from distllm.config.schema import Config
from distllm.data.prepared import PreparedData
from distllm.engine.engine import Engine
from distllm.layout.grid import Grid
from distllm.layout.save_groups import create_save_groups
from distllm.metrics.format import duration
from distllm.metrics.run_directory import utc_now
from distllm.optimizers import recipe_of
from distllm.trainer.reporter import Reporter
from distllm.trainer.save_time import expected_save_seconds
from distllm.trainer.state import TrainState

TOKENIZER_FOLDER = "tokenizer"
LIBRARIES = ("torch", "deepspeed", "megatron-core")


class Checkpoints:
    """The checkpoints of one run: begins to save them, reports the outcomes, and removes old ones."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        prepared: PreparedData,
        records: Mapping[str, Mapping[str, Any]],
        reporter: Reporter,
        start: TrainState,
    ) -> None:
        """Prepare to save; `start` is the state that the job starts from.

        records: of all sources that the run has drawn from (data/record.py).
        """
        timeout = timedelta(seconds=config.checkpoint.timeout_seconds)
        self._saver = Saver(
            create_save_groups(engine.groups.grid, timeout), is_async=config.checkpoint.async_save
        )
        self._config = config
        self._engine = engine
        self._prepared = prepared
        self._records = records
        self._reporter = reporter
        self._begun_step = start.step
        self._last_error: str | None = None
        self._retention_error: str | None = None
        if config.checkpoint.interval:
            self._saver.reserve(engine.fragments())

    def warn_of_short_grace(self) -> None:
        """Warn, at the start of a job, if a save is expected to take longer than the grace period.

        Such a save is cut off by SIGKILL.
        """
        if not self._reporter.is_main or self._config.checkpoint.interval == 0:
            return
        run, grace = self._reporter.run, self._config.fault.grace_seconds
        num_tensors = recipe_of(self._config.optimizer).tensors_per_parameter
        expected = expected_save_seconds(run.path, self._engine.fragments(), num_tensors, run.read_events())
        if expected is not None and expected > grace:
            self._reporter.warn(
                f"a save is expected to take {duration(expected)}, longer than fault.grace_seconds={grace}: "
                "a job that is asked to stop may lose its steps since the last checkpoint. Ask for the "
                "signal earlier, or save more often"
            )

    def save(self, state: TrainState, reason: str) -> None:
        """Save a checkpoint; with `checkpoint.async_save` the write goes on in the background. Collective."""
        self._begun_step = state.step
        path = checkpoint_path(self._reporter.run.checkpoints_path, state.step)
        self._engine.before_save()
        contents = Contents(
            state.step,
            self._engine.scalars(),
            checkpoint_details(
                self._config, self._engine.groups.grid, self._prepared, self._records, state, reason
            ),
            tokenizer_files(self._prepared.tokenizer_folder),
        )
        self._saver.save(path, self._engine.fragments(), contents, after=lambda: self._remove_old(path))
        self.report()

    def save_to_stop(self, state: TrainState) -> None:
        """Save the step at which the job was asked to stop, unless it is saved or being saved already."""
        if self._config.checkpoint.interval and state.step != self._begun_step:
            self.save(state, "stop")

    def wait(self) -> None:
        """Wait until nothing is being written, and report the outcomes."""
        self._saver.wait()
        self.report()

    def report(self) -> None:
        """Report the outcomes of saves that have ended; raise any error that did not come from the disk."""
        for outcome in self._saver.outcomes():
            self._tell(outcome)
        if self._retention_error:
            self._reporter.event("old checkpoint stays", self._retention_error)
            self._reporter.warn(f"an old checkpoint could not be removed: {self._retention_error}")
            self._retention_error = None

    def finish(self) -> None:
        """Wait for what is being written. OSError: the last save has failed, so its steps would be lost."""
        self.wait()
        if self._last_error:
            raise OSError(f"the last checkpoint could not be written: {self._last_error}")

    def _tell(self, outcome: Outcome) -> None:
        self._last_error = outcome.error
        times = {
            "seconds": round(outcome.seconds, 3),
            "blocking_seconds": round(outcome.blocking_seconds, 3),
        }
        if outcome.error:
            self._reporter.event("checkpoint failed", outcome.error, step=outcome.step, **times)
            self._reporter.warn(
                f"step {outcome.step}: no checkpoint could be written, training goes on without: "
                f"{outcome.error}"
            )
            return
        self._reporter.event("checkpoint", "saved", step=outcome.step, path=str(outcome.path), **times)
        waited = f", training waited {duration(outcome.blocking_seconds)}" if self._saver.is_async else ""
        self._reporter.progress.note(
            f"step {outcome.step}: checkpoint saved in {duration(outcome.seconds)}{waited}: {outcome.path}"
        )

    def _remove_old(self, newest: Path) -> None:
        """Remove old checkpoints. Runs in the background, so errors are noted for `report`.

        An old checkpoint that cannot be removed does not end the job.
        """
        if self._reporter.is_main:
            try:
                remove_old(newest, self._config.checkpoint)
            except OSError as error:
                self._retention_error = str(error)


def checkpoint_details(
    config: Config,
    grid: Grid,
    prepared: PreparedData,
    records: Mapping[str, Mapping[str, Any]],
    state: TrainState,
    reason: str,
) -> dict[str, Any]:
    """Return what the manifest holds beside the tensors."""
    return {
        "reason": reason,
        "time": utc_now(),
        "config": to_plain(config),
        "layout": grid.described,
        "data": {"sources": records},
        "state": state.to_plain(),
        "tokenizer": {"folder": TOKENIZER_FOLDER, "vocab_size": prepared.vocab_size},
        "versions": {"distllm": __version__} | {name: version(name) for name in LIBRARIES},
    }


def tokenizer_files(folder: Path) -> Mapping[str, bytes]:
    """Return the tokenizer's files as attachments of a checkpoint.

    With them a checkpoint is complete without the cache in which the tokenizer was prepared.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    return {
        f"{TOKENIZER_FOLDER}/{name}": (folder / name).read_bytes()
        for name in names
        if (folder / name).is_file()
    }

"""`ledger/ledger.json` in the run directory: all that `distllm trace` needs to say what went where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.data.ledger import History, history_from_plain, history_to_plain
from distllm.metrics.jsonl import write_atomically
from distllm.metrics.run_directory import RunDirectory
from distllm.trainer.reporter import Reporter
from distllm.trainer.state import TrainState


@dataclass(frozen=True)
class Ledger:
    """records: of every source that was ever drawn from (data/record.py). cache: where packings lie."""

    seed: int
    seq_length: int
    packing: str
    cache: Path
    records: dict[str, dict[str, Any]]
    history: History
    skipped: tuple[tuple[int, int], ...]


class LedgerFile:
    """Keeps the file up to date; rank 0 writes, on other ranks the same calls do nothing."""

    def __init__(self, config: Config, records: Mapping[str, Mapping[str, Any]], reporter: Reporter) -> None:
        self._config = config
        self._records = records
        self._reporter = reporter
        self._kept: TrainState | None = None

    def keep(self, state: TrainState) -> None:
        """Called before every step; writes where the plan has changed, which is seldom."""
        kept = self._kept
        if kept and kept.history == state.history and kept.skipped == state.skipped:
            return
        if not self._reporter.is_main:
            return
        content = {
            "seed": self._config.train.seed,
            "seq_length": self._config.model.seq_length,
            "packing": self._config.sequences.packing,
            "cache": str(Path(self._config.data.cache).expanduser().absolute()),
            "sources": self._records,
            "history": history_to_plain(state.history),
            "skipped": state.skipped,
        }
        path = self._reporter.run.ledger_path
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
        except OSError as error:  # a full disk ends no job; the next change is written with this one
            self._reporter.warn(f"{path} could not be written: {error}")
            return
        self._kept = state


def read_ledger(run: RunDirectory) -> Ledger:
    """User error: no such file."""
    if not run.ledger_path.is_file():
        rule = f"must be the folder of a run that has taken a step (there is no {run.ledger_path})"
        raise user_error("run.dir", run.path, rule, "run.dir=FOLDER of `distllm train`")
    content = json.loads(run.ledger_path.read_text())
    return Ledger(
        content["seed"],
        content["seq_length"],
        content["packing"],
        Path(content["cache"]),
        content["sources"],
        history_from_plain(content["history"]),
        tuple((first, end) for first, end in content["skipped"]),
    )

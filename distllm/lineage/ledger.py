"""`ledger/ledger.json` in the run directory: all that `distllm lineage` needs to trace samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.lineage.history import History, Ranges, history_from_plain, history_to_plain
from distllm.metrics.jsonl import write_atomically
from distllm.metrics.run_directory import RunDirectory


@dataclass(frozen=True)
class Ledger:
    """The content of the file.

    records: of every source that was ever drawn from (data/record.py). cache: the folder of packings.
    """

    seed: int
    seq_length: int
    packing: str
    cache: Path
    records: dict[str, dict[str, Any]]
    history: History
    skipped: Ranges


class LedgerFile:
    """Keeps the file up to date."""

    def __init__(
        self,
        path: Path | None,
        config: Config,
        records: Mapping[str, Mapping[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        """Open the ledger.

        path: None on ranks that do not write. records: of all sources that the run has drawn from.
        """
        self._path = path
        self._config = config
        self._records = records
        self._warn = warn
        self._kept: tuple[History, Ranges] | None = None

    def keep(self, history: History, skipped: Ranges) -> None:
        """Write the history if the plan has changed, which is seldom; called before every step."""
        if self._path is None or self._kept == (history, skipped):
            return
        content = {
            "seed": self._config.train.seed,
            "seq_length": self._config.model.seq_length,
            "packing": self._config.sequences.packing,
            "cache": str(Path(self._config.data.cache).expanduser().absolute()),
            "sources": self._records,
            "history": history_to_plain(history),
            "skipped": skipped,
        }
        try:
            self._path.parent.mkdir(exist_ok=True)
            write_atomically(self._path, json.dumps(content, indent=1).encode() + b"\n")
        except OSError as error:  # a full disk does not end the job; the next change is written with this one
            self._warn(f"{self._path} could not be written: {error}")
            return
        self._kept = (history, skipped)


def read_ledger(run: RunDirectory) -> Ledger:
    """Read the ledger of a run. User error: no such file."""
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

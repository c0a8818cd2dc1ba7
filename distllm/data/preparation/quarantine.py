"""Rows and files that cannot be used: set aside and listed in quarantine.jsonl, one JSON object each."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distllm.config.data_schema import Source
from distllm.config.problems import UserError, user_error
from distllm.data.sources import Rejected, kind_of

FILE = "quarantine.jsonl"


class BadInputError(Exception):
    """The first rejected row of a unit, where preparation.bad_input=stop. unit: its index."""

    def __init__(self, unit: int, rejected: Rejected) -> None:
        super().__init__(unit, rejected)  # pickled on the way from a worker
        self.unit = unit
        self.rejected = rejected


class Quarantine:
    """Writes rejected rows, and counts them by reason. num_files: number of files that they come from."""

    def __init__(self, folder: Path) -> None:
        self.reasons: Counter[str] = Counter()
        self.num_files = 0
        self._last_file: object = None
        self._lines = (folder / FILE).open("w")

    def add(self, entry: dict[str, Any]) -> None:
        self.reasons[entry["reason"]] += 1
        self.num_files += entry["file"] != self._last_file  # the rows of a file come together
        self._last_file = entry["file"]
        self._lines.write(json.dumps(entry) + "\n")

    def finish(self) -> None:
        self._lines.close()


def entry_of(rejected: Rejected) -> dict[str, Any]:
    """Return the entry in a piece: the file by its index, the row counted within the unit."""
    return asdict(rejected)


def absolute(entry: dict[str, Any], path: str, first_row: int, source: Source) -> dict[str, Any]:
    """Return the entry in the corpus: the file by its path, the row counted within the file, and its line."""
    row = None if entry["row"] is None else entry["row"] + first_row
    line = {"line": None if row is None else row + 1} if kind_of(source).counts_lines else {}
    return {"file": path, "row": row, **line, "reason": entry["reason"], "detail": entry["detail"]}


def stopped(entry: dict[str, Any]) -> UserError:
    """Return the error that stops the job. entry: an absolute one."""
    place = "line" if "line" in entry else "row"
    number = "" if entry["row"] is None else f", {place} {entry[place]}"
    detail = f" ({entry['detail']})" if entry["detail"] else ""
    return user_error(
        "preparation.bad_input",
        "stop",
        f"every row must be usable; {entry['file']}{number}: {entry['reason']}{detail}",
        "repair it, leave the file out of data.path, or preparation.bad_input=quarantine",
    )


def summary(reasons: dict[str, int], num_files: int, folder: Path) -> str:
    """Summarize the quarantine in one line for the user."""
    num_rows = sum(reasons.values())
    if set(reasons) == {"empty"}:
        return f"left out {num_rows:,} empty documents"
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    return f"set aside {num_rows:,} rows of {num_files:,} files ({counts}): {folder / FILE}"

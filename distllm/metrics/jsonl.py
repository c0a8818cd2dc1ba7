"""Rows as JSON lines that any strict reader accepts, and files that are never seen half-written."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NON_FINITE = "non_finite"


def dump_line(row: Mapping[str, object]) -> bytes:
    """Return a row as one line, newline included.

    JSON has no NaN and no infinity: such a value becomes null, and `non_finite` names it, as in `{"step": 3,
    "loss": null, "non_finite": {"loss": "nan"}}`, so that strict readers accept the line and nothing is lost.
    Only top-level values may be non-finite: ValueError for nested ones, TypeError for other types.
    """
    non_finite = {k: str(v) for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    finite = {name: None if name in non_finite else value for name, value in row.items()}
    if non_finite:
        finite[NON_FINITE] = non_finite
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def load_line(line: bytes) -> dict[str, Any]:
    """Return the row that `dump_line` wrote. ValueError when the line is not a whole JSON object."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {line[:80]!r}")
    for name, value in row.pop(NON_FINITE, {}).items():
        row[name] = float(value)
    return row


def append_line(path: Path, row: Mapping[str, object]) -> None:
    """Append one row in a single write, so that a kill truncates at most the last line.

    A line truncated by an earlier kill is ended first: otherwise this row would be joined to it and lost too.
    """
    line = dump_line(row)
    with open(path, "ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        written = file.write(line)
        if written != len(line):  # an almost full disk can write a part without an error
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class PatientLines:
    """Appends rows to a file, and keeps rows that the disk rejects until it accepts them.

    warn: called with a message when the disk begins to reject rows.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._waiting: list[Mapping[str, object]] = []

    def append(self, row: Mapping[str, object]) -> None:
        self._waiting.append(row)
        try:
            self.flush()
        except OSError as error:
            if len(self._waiting) == 1:
                self._warn(f"{error}; rows of {self._path.name} are kept in memory until they can be written")

    def flush(self) -> None:
        """Write the waiting rows; OSError where they cannot be written."""
        while self._waiting:
            append_line(self._path, self._waiting[0])
            del self._waiting[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path`: readers see the old file or the new one, never half of it. OSError as from `open`."""
    # Unique per thread: the watchdog may write the same file while the main thread does. Not `tempfile`,
    # whose files only their owner can read.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

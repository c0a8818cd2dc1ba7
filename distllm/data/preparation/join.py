"""Join pieces, in the order of the documents, into the files of a prepared corpus."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distllm.data.indexed import HEADER, token_type
from distllm.data.preparation.pieces import Work
from distllm.data.preparation.progress import PROGRESS_SECONDS
from distllm.data.preparation.quarantine import FILE as QUARANTINE
from distllm.data.preparation.quarantine import BadInputError, Quarantine, absolute, entry_of
from distllm.data.preparation.splits import ORIGIN, SplitWriter, fingerprint, split_names
from distllm.data.prepared import Split
from distllm.data.sources import UnitEnd, read_unit

FILES = "files.json"


@dataclass(frozen=True)
class Joined:
    """The result of joining.

    splits: those that were asked for; one may be without documents. rejected: number of rows by reason.
    num_rejected_files: number of files that the rejected rows come from.
    """

    splits: dict[str, Split]
    fingerprint: str
    rejected: dict[str, int]
    num_rejected_files: int


def join(work: Work, folder: Path, vocab_size: int, report: Callable[[str], None]) -> Joined:
    """Write all that `folder` holds but its manifest, with no more than one piece in memory.

    Every piece must be complete.
    """
    writers = {name: SplitWriter(folder / name, vocab_size) for name in split_names(work.validation_fraction)}
    quarantine = Quarantine(folder)
    first_row = FirstRow()
    reported = time.monotonic()
    for index, unit in enumerate(work.units):
        facts, piece = work.facts(index), work.piece(index)
        row = first_row.of(unit.first_file, unit.start is not None, facts["num_rows"])
        for name, writer in writers.items():
            _append(writer, piece / name, row, facts["num_bytes"][name])
        for line in (piece / QUARANTINE).read_text().splitlines():
            entry = json.loads(line)
            quarantine.add(absolute(entry, work.files[entry["file"]].path, row, work.source))
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            report(f"joined {index + 1:,} of {len(work.units):,} pieces")
    quarantine.finish()
    files = [[file.path, file.num_bytes, file.modified_ns] for file in work.files]
    (folder / FILES).write_text(json.dumps(files, indent=0) + "\n")
    digests = [writer.tokens.sums.digest.hexdigest() for writer in writers.values()]
    splits = {name: writer.finish() for name, writer in writers.items()}
    reasons = dict(sorted(quarantine.reasons.items()))
    return Joined(splits, fingerprint(digests, vocab_size), reasons, quarantine.num_files)


class FirstRow:
    """Finds the first row of each unit within its file; units are asked for in order."""

    def __init__(self) -> None:
        self._file = -1
        self._num_rows = 0

    def of(self, file: int, is_range: bool, num_rows: int) -> int:
        """Return the first row of the next unit. num_rows: of this unit."""
        if not is_range:
            return 0  # the rows of whole files are counted from the start of each
        first_row = self._num_rows if file == self._file else 0
        self._file, self._num_rows = file, first_row + num_rows
        return first_row


def absolute_entry(work: Work, error: BadInputError) -> dict[str, Any]:
    """Return the entry of a rejected row whose unit was abandoned, with its row counted within the file.

    To count rows, the earlier units of the file are read, whether their pieces are complete or not.
    """
    unit = work.units[error.unit]
    row = 0
    if unit.start is not None:
        earlier = [i for i in range(error.unit) if work.units[i].first_file == unit.first_file]
        row = sum(_count_rows(work, index) for index in earlier if work.units[index].start is not None)
    rejected = entry_of(error.rejected)
    return absolute(rejected, work.files[rejected["file"]].path, row, work.source)


def _count_rows(work: Work, index: int) -> int:
    if work.is_whole(index):
        return int(work.facts(index)["num_rows"])
    for item in read_unit(work.source, work.files, work.units[index], work.max_document_bytes):
        if isinstance(item, UnitEnd):
            return item.num_rows
    raise AssertionError("a unit ends with its number of rows")


def _append(writer: SplitWriter, prefix: Path, first_row: int, num_bytes: int) -> None:
    """Append a split of a piece."""
    origins = np.fromfile(f"{prefix}.origins", ORIGIN)
    if not len(origins):
        return  # an empty file cannot be mapped
    origins["row"] += np.uint64(first_row)
    lengths = np.fromfile(f"{prefix}.idx", "<i4", len(origins), offset=HEADER.size)
    tokens = np.memmap(f"{prefix}.bin", token_type(writer.tokens.vocab_size), "r")
    writer.append(tokens, lengths, origins, num_bytes)

"""The tokens of one unit of the corpus: a folder that one worker makes alone, visible only when complete.

A piece holds what the prepared corpus holds of its unit: token files and origins of both splits,
quarantine.jsonl, and piece.json with the totals. Rows are counted within the unit; `join.py` adds those of
the file's earlier units. The same unit gives the same bytes wherever and however often it is made.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distllm.config.data_schema import Source
from distllm.data.cache import digest, to_disk
from distllm.data.preparation.quarantine import BadInputError, Quarantine, entry_of
from distllm.data.preparation.splits import ORIGIN, SplitWriter, is_held_out, split_names
from distllm.data.sources import Document, InputFile, Rejected, Unit, UnitEnd, read_unit
from distllm.data.tokenizer import TextTokenizer, batched

FACTS = "piece.json"
UNFINISHED = ".unfinished"

# How many bytes of text and how many tokens have been added to a piece.
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Work:
    """A corpus that is to be tokenized; all that a worker must know.

    units: in the order of the documents. folder: of the pieces.
    stops: whether the first rejected row stops the job.
    label: of the processes that share this work; unfinished pieces left by others of this label are removed.
    """

    source: Source
    files: list[InputFile]
    units: list[Unit]
    folder: Path
    tokenizer_folder: Path
    end_of_document: str
    validation_fraction: float
    max_document_bytes: int | None
    stops: bool
    label: str

    @property
    def num_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)

    def piece(self, index: int) -> Path:
        """Return the folder of a piece. Its name holds the unit: other cuts need other pieces."""
        unit = json.dumps(asdict(self.units[index])).encode()
        return self.folder / f"{index:06d}-{digest(unit)[:12]}"

    def is_whole(self, index: int) -> bool:
        return self.piece(index).is_dir()

    def missing(self, indices: Sequence[int] | None = None) -> list[int]:
        among = range(len(self.units)) if indices is None else indices
        return [index for index in among if not self.is_whole(index)]

    def facts(self, index: int) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.piece(index) / FACTS).read_text())
        return facts


def write_piece(
    work: Work, index: int, tokenizer: TextTokenizer, characters_per_batch: int, advance: Advance
) -> None:
    """Tokenize a unit. BadInputError: it holds a row that cannot be used, and `work.stops`."""
    piece = work.piece(index)
    # The name is unique: two processes may make the same piece at once, and both results are valid.
    unfinished = work.folder / f"{piece.name}.{_owner(work)}.{os.getpid()}{UNFINISHED}"
    unfinished.mkdir()
    try:
        facts = _fill(unfinished, work, index, tokenizer, characters_per_batch, advance)
        (unfinished / FACTS).write_text(json.dumps(facts))
        for file in unfinished.iterdir():
            to_disk(file)
        to_disk(unfinished)
        try:
            unfinished.rename(piece)
        except OSError:
            if not work.is_whole(index):  # else another process was faster
                raise
        to_disk(work.folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(work: Work) -> None:
    """Remove what killed processes of `work.label` left on this machine; none of them may be running."""
    for folder in work.folder.glob(f"*.{_owner(work)}.*{UNFINISHED}*"):
        # Renamed first: else a worker that is just ending could give a half-removed folder the name of a
        # piece.
        with suppress(FileNotFoundError):
            shutil.rmtree(folder.rename(f"{folder}.removed"), ignore_errors=True)


def _owner(work: Work) -> str:
    return f"{socket.gethostname()}.{work.label}"


def _fill(
    folder: Path,
    work: Work,
    index: int,
    tokenizer: TextTokenizer,
    characters_per_batch: int,
    advance: Advance,
) -> dict[str, Any]:
    names = split_names(work.validation_fraction)
    writers = {name: SplitWriter(folder / name, tokenizer.vocab_size) for name in names}
    rows = UnitRows(work, index, folder)
    for batch in batched(rows.documents(), lambda document: len(document.text) + 1, characters_per_batch):
        num_bytes, num_tokens = _append_batch(work, batch, tokenizer, writers)
        advance(num_bytes, num_tokens)
    rows.quarantine.finish()
    for writer in writers.values():
        writer.finish()
    num_bytes_of_text = {name: writer.num_bytes for name, writer in writers.items()}
    return {"unit": asdict(work.units[index]), "num_rows": rows.num_rows, "num_bytes": num_bytes_of_text}


class UnitRows:
    """Iterates over the documents of a unit and quarantines rejected rows. num_rows: known at the end."""

    def __init__(self, work: Work, index: int, folder: Path) -> None:
        self.quarantine = Quarantine(folder)
        self.num_rows = 0
        self._work = work
        self._index = index

    def documents(self) -> Iterator[Document]:
        work = self._work
        for item in read_unit(work.source, work.files, work.units[self._index], work.max_document_bytes):
            match item:
                case Document():
                    yield item
                case Rejected():
                    if work.stops:
                        raise BadInputError(self._index, item)
                    self.quarantine.add(entry_of(item))
                case UnitEnd():
                    self.num_rows = item.num_rows


def _append_batch(
    work: Work, batch: list[Document], tokenizer: TextTokenizer, writers: dict[str, SplitWriter]
) -> tuple[int, int]:
    """Append a batch; return the number of bytes and of tokens."""
    end = np.array([tokenizer.end_of_document], dtype=np.int32)
    encoded = tokenizer.encode_batch([document.text for document in batch])
    found: dict[str, list[tuple[Document, np.ndarray, int]]] = {name: [] for name in writers}
    for document, tokens in zip(batch, encoded, strict=True):
        content = document.text.encode()
        held_out = is_held_out(content, work.validation_fraction)
        found["validation" if held_out else "train"].append((document, tokens, len(content)))
    for name, documents in found.items():
        if documents:
            writers[name].append(
                tokens=np.concatenate([part for _, tokens, _ in documents for part in (tokens, end)]),
                lengths=np.array([len(tokens) + 1 for _, tokens, _ in documents]),
                origins=np.array([(document.file, document.row) for document, *_ in documents], ORIGIN),
                num_bytes=sum(num_bytes for *_, num_bytes in documents),
            )
    num_bytes = sum(num_bytes for documents in found.values() for *_, num_bytes in documents)
    return num_bytes, sum(len(tokens) + 1 for tokens in encoded)

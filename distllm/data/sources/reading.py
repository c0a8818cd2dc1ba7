"""The documents of a unit, whatever their format. Bad input becomes `Rejected` here and is never fatal."""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.data_schema import Source
from distllm.data.sources import huggingface, jsonl, tables, text
from distllm.data.sources.documents import Document, InputFile, Rejected, Rows, Unit, UnitEnd
from distllm.data.sources.packed import is_packed


def read_unit(
    source: Source, files: list[InputFile], unit: Unit, max_document_bytes: int | None
) -> Iterator[Document | Rejected | UnitEnd]:
    """All documents and rejected rows of `unit`, in order, then one `UnitEnd`.

    Holds one batch of rows in memory, and nothing of a document beyond a small multiple of
    `max_document_bytes` where the format allows.
    """
    num_rows = 0
    for file in range(unit.first_file, unit.end_file):
        rows = _read_file(source, files, file, unit, max_document_bytes)
        # Of plain lines only a file without a byte is told: blank lines are nothing in any part of a file.
        is_blank_allowed = source.source == "jsonl" and not is_packed(files[file].path)
        is_whole = unit.start is None and (files[file].num_bytes == 0 or not is_blank_allowed)
        num_rows += yield from _told_if_empty(rows, file) if is_whole else rows
    yield UnitEnd(num_rows)


def _told_if_empty(rows: Rows, file: int) -> Rows:
    """The same; a whole file that gives nothing at all, not even a bad row, is rejected."""
    is_empty = True
    while True:
        try:
            row = next(rows)
        except StopIteration as end:
            if is_empty:
                yield Rejected(file, None, "empty", "the file holds no document")
            return int(end.value)
        is_empty = False
        yield row


def _read_file(source: Source, files: list[InputFile], file: int, unit: Unit, limit: int | None) -> Rows:
    path = files[file].path
    match source.source:
        case "text":
            return text.read(path, file, limit)
        case "stdlib":
            # A few of the library's own test files are broken on purpose or declare another encoding.
            return text.read(path, file, limit, errors="replace")
        case "jsonl":
            return jsonl.read(path, file, source.text_field, limit, unit.start, unit.stop)
        case "parquet" | "arrow":
            return tables.read_table(
                path, source.source, file, source.text_field, limit, unit.start, unit.stop
            )
        case "huggingface":
            return huggingface.read_shard(source, files, file, unit.start, unit.stop, limit)
    raise AssertionError(f"no reader of {source.source}")

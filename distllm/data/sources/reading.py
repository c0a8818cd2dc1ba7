"""The documents of a unit, whatever their format. Bad input becomes `Rejected` here and is never fatal."""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.data_schema import Source
from distllm.data.sources import huggingface, jsonl, tables, text
from distllm.data.sources.documents import Document, InputFile, Rejected, Rows, Unit, UnitEnd


def read_unit(
    source: Source, files: list[InputFile], unit: Unit, max_document_bytes: int | None
) -> Iterator[Document | Rejected | UnitEnd]:
    """All documents and rejected rows of `unit`, in order, then one `UnitEnd`.

    Holds one batch of rows in memory, and nothing of a document beyond a small multiple of
    `max_document_bytes` where the format allows.
    """
    num_rows = 0
    for file in range(unit.first_file, unit.end_file):
        num_rows += yield from _read_file(source, files, file, unit, max_document_bytes)
    yield UnitEnd(num_rows)


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

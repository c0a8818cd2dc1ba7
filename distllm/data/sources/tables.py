"""The text column of Parquet and Arrow files, in batches. What is read there is checked row by row here.

The formats hold a batch of rows in one piece: a too long document is in memory with its batch before it is
rejected. Of Parquet that is about BATCH_BYTES, or one row, and a page; of Arrow, what the writer made one
record batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from distllm.data.sources.documents import (
    Document,
    Rejected,
    Rows,
    checked_document,
    too_long,
    unreadable,
)

Format = Literal["parquet", "arrow"]

BATCH_BYTES = 4 << 20
BATCH_ROWS = 4096
ARROW_FILE_MAGIC = b"ARROW1"

# ValueError, IndexError: of a broken file, names that are not UTF-8 and numbers out of range.
READ_ERRORS = (OSError, ValueError, IndexError, pa.ArrowException)


def read_schema(path: str, kind: Format) -> pa.Schema:
    """Raises one of READ_ERRORS."""
    if kind == "parquet":
        return pq.read_schema(path)
    with pa.OSFile(path) as stream:
        return _open_arrow(stream).schema


def part_sizes(path: str, kind: Format) -> list[int]:
    """Sizes, in no particular unit, of the row groups or record batches; [] where they cannot be told apart.

    Raises one of READ_ERRORS.
    """
    if kind == "parquet":
        metadata = pq.read_metadata(path)
        return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    with pa.OSFile(path) as stream:
        reader = _open_arrow(stream)
        # A stream tells its batches only to those who read it all.
        return [1] * reader.num_record_batches if isinstance(reader, pa.RecordBatchFileReader) else []


def column_problem(schema: pa.Schema, text_field: str) -> tuple[str, str] | None:
    """Reason and detail for which `text_field` is no column of text."""
    index = schema.get_field_index(text_field)
    if index < 0:
        return "missing field", f"no column {text_field!r} among {schema.names}"
    kind = schema.field(index).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Some writers leave away that their bytes are text. All null is text that is not there.
    if kind not in (*TEXT_AS_BYTES, *TEXT_AS_BYTES.values(), pa.null()):
        return "not text", f"column {text_field!r} holds {kind}"
    return None


def read_table(
    path: str,
    kind: Format,
    file: int,
    text_field: str,
    max_document_bytes: int | None,
    start: int | None = None,
    stop: int | None = None,
) -> Rows:
    """The rows of a file, or of its row groups or record batches [start, stop); a broken one is left out."""
    row = 0
    try:
        problem = column_problem(read_schema(path, kind), text_field)
        if problem:
            yield Rejected(file, None, *problem)
            return 0
        for place, num_rows, columns in PARTS[kind](path, text_field, start, stop):
            first_row = row
            try:
                for column in columns:
                    for encoded in encoded_texts(column):
                        yield decoded_document(encoded, file, row, max_document_bytes)
                        row += 1
            except READ_ERRORS as error:
                yield unreadable(file, error, f"{place}, after {row - first_row} rows")
            if num_rows is not None:
                row = first_row + num_rows
    except READ_ERRORS as error:
        yield unreadable(file, error)
    return row


# Of each row group or record batch: where it is, its number of rows if that is told, and its text in pieces.
Parts = Iterator[tuple[str, int | None, Iterator[pa.Array]]]


def _parquet_parts(path: str, text_field: str, start: int | None, stop: int | None) -> Parts:
    # Pages are read one after the other; as it stands pyarrow takes the whole column of a row group at once.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as parquet:
        index = parquet.schema_arrow.get_field_index(text_field)
        assert index >= 0, "column_problem() must have seen to it"
        for group in range(start or 0, parquet.num_row_groups if stop is None else stop):
            metadata = parquet.metadata.row_group(group)
            columns = (metadata.column(number) for number in range(metadata.num_columns))
            num_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
            batches = parquet.iter_batches(
                batch_size=_rows_per_batch(metadata.num_rows, num_bytes),
                row_groups=[group],
                columns=[text_field],
                use_threads=False,
            )
            yield f"row group {group}", metadata.num_rows, (batch.column(0) for batch in batches)


def _arrow_parts(path: str, text_field: str, start: int | None, stop: int | None) -> Parts:
    # Not mapped into memory: an I/O error there would kill the process.
    with pa.OSFile(path) as stream:
        index = _open_arrow(stream).schema.get_field_index(text_field)
        stream.seek(0)
        reader = _open_arrow(stream, pa.ipc.IpcReadOptions(included_fields=[index], use_threads=False))
        if isinstance(reader, pa.RecordBatchFileReader):
            for number in range(start or 0, reader.num_record_batches if stop is None else stop):
                yield f"record batch {number}", None, _record_batch(reader, number)
        else:
            yield "stream of record batches", None, (batch.column(0) for batch in reader)


def _record_batch(reader: pa.RecordBatchFileReader, number: int) -> Iterator[pa.Array]:
    yield reader.get_batch(number).column(0)


PARTS = {"parquet": _parquet_parts, "arrow": _arrow_parts}


def _open_arrow(
    stream: pa.NativeFile, options: pa.ipc.IpcReadOptions | None = None
) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    is_file = stream.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    stream.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(stream, options=options)


TEXT_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def encoded_texts(column: pa.Array) -> Iterator[bytes | None]:
    """The rows of a text column as they are in memory: one that is not UTF-8 spoils no other."""
    if pa.types.is_dictionary(column.type):
        texts = list(encoded_texts(column.dictionary))
        for index in column.indices.to_pylist():
            if index is not None and not 0 <= index < len(texts):
                raise IndexError(f"the dictionary has {len(texts)} texts, not one at {index}")
            yield None if index is None else texts[index]
        return
    size = _rows_per_batch(len(column), column.nbytes)
    for start in range(0, len(column), size):
        yield from _as_bytes(column.slice(start, size)).to_pylist()


def decoded_document(
    encoded: bytes | None, file: int, row: int, max_document_bytes: int | None
) -> Document | Rejected:
    if encoded is None:
        encoded = b""
    if max_document_bytes is not None and len(encoded) > max_document_bytes:
        return too_long(file, row, len(encoded), max_document_bytes)
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        return Rejected(file, row, "invalid UTF-8", f"{error.reason} at byte {error.start}")
    return checked_document(text, file, row, max_document_bytes)


def _as_bytes(column: pa.Array) -> pa.Array:
    if column.type in TEXT_AS_BYTES:
        column = column.view(TEXT_AS_BYTES[column.type])
    column.validate(full=True)  # or a broken file could make pyarrow read beside its memory
    return column


def _rows_per_batch(num_rows: int, num_bytes: int) -> int:
    return min(max(1, BATCH_BYTES * num_rows // max(1, num_bytes)), BATCH_ROWS)

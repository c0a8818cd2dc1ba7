"""The text column of tables in memory, in batches. Its rows are checked here one by one.

The formats hold a batch of rows in one piece: a document that is too long is in memory with its batch before
it is rejected. For Parquet that is about BATCH_BYTES, or one row, and a page; for Arrow, one record batch as
it was written.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from distllm.data.sources.documents import Document, Rejected, checked_document, too_long

BATCH_BYTES = 4 << 20
BATCH_ROWS = 4096

# ValueError, IndexError: raised for a broken file, names that are not UTF-8 and numbers out of range.
READ_ERRORS = (OSError, ValueError, IndexError, pa.ArrowException)

TEXT_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def column_problem(schema: pa.Schema, text_field: str) -> tuple[str, str] | None:
    """Return reason and detail if `text_field` is not a column of text."""
    index = schema.get_field_index(text_field)
    if index < 0:
        return "missing field", f"no column {text_field!r} among {schema.names}"
    kind = schema.field(index).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Some writers omit that their bytes are text. A column of nulls only is text that is missing.
    if kind not in (*TEXT_AS_BYTES, *TEXT_AS_BYTES.values(), pa.null()):
        return "not text", f"column {text_field!r} holds {kind}"
    return None


def encoded_texts(column: pa.Array) -> Iterator[bytes | None]:
    """Yield the rows of a text column as raw bytes: one that is not UTF-8 does not affect the others."""
    if pa.types.is_dictionary(column.type):
        texts = list(encoded_texts(column.dictionary))
        for index in column.indices.to_pylist():
            if index is not None and not 0 <= index < len(texts):
                raise IndexError(f"the dictionary has {len(texts)} texts, not one at {index}")
            yield None if index is None else texts[index]
        return
    size = rows_per_batch(len(column), column.nbytes)
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
    column.validate(full=True)  # else a broken file could make pyarrow read outside its buffers
    return column


def rows_per_batch(num_rows: int, num_bytes: int) -> int:
    return min(max(1, BATCH_BYTES * num_rows // max(1, num_bytes)), BATCH_ROWS)

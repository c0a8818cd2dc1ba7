"""JSON lines: one object each, plain or packed. Read in binary, so that no locale affects decoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from distllm.config.data_schema import Source
from distllm.data.sources.documents import (
    Document,
    InputFile,
    Rejected,
    Rows,
    Unit,
    checked_document,
    too_long,
    unreadable,
)
from distllm.data.sources.packed import READ_ERRORS, is_packed, open_unpacked
from distllm.data.sources.ranges import Range, even_ranges
from distllm.data.sources.source_kind import SourceKind

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECE_BYTES = 1 << 20

# A byte of text takes at most six in JSON (\u0041). The rest of a line comes on top.
ESCAPED_BYTES = 6
OTHER_FIELDS_BYTES = 1 << 20


class JsonLines(SourceKind):
    counts_lines = True

    def ranges(self, source: Source, file: InputFile, unit_bytes: int) -> Iterator[Range]:
        if not is_packed(file.path):
            yield from even_ranges(file.num_bytes, file.num_bytes, unit_bytes)

    def may_be_blank(self, file: InputFile) -> bool:
        """Accept blank plain files: they can be cut, and blank lines are ignored in every part."""
        return not is_packed(file.path)

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        path = files[file].path
        return _read_lines(path, file, source.text_field, max_document_bytes, unit.start, unit.stop)


def _read_lines(
    path: str,
    file: int,
    text_field: str,
    max_document_bytes: int | None,
    start: int | None,
    stop: int | None,
) -> Rows:
    """Read the lines of a file, or those that start at its bytes [start, stop)."""
    row = 0
    longest_line = (
        -1 if max_document_bytes is None else ESCAPED_BYTES * max_document_bytes + OTHER_FIELDS_BYTES
    )
    try:
        with open_unpacked(path) as stream:
            position = _first_line(stream, start, stop) if start else 0
            while stop is None or position < stop:
                line = stream.readline(longest_line)
                if not line:
                    break
                position += len(line)
                if len(line) == longest_line and not line.endswith(b"\n"):
                    num_skipped = _skip_line(stream)
                    position += num_skipped
                    yield too_long(file, row, len(line) + num_skipped, longest_line, "line")
                elif (result := _parse(line, file, row, text_field, max_document_bytes)) is not None:
                    yield result
                row += 1
    except READ_ERRORS as error:
        yield unreadable(file, error, f"after line {row}")
    return row


def _first_line(stream: BinaryIO, start: int, stop: int | None) -> int:
    """Go to the first line that starts at `start` or later; return its place, at most `stop`."""
    position = stream.seek(start - 1)
    while stop is None or position < stop:
        piece = stream.readline(PIECE_BYTES if stop is None else min(PIECE_BYTES, stop - position))
        position += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return position


def _skip_line(stream: BinaryIO) -> int:
    """Skip the rest of a line; return how many bytes it had."""
    num_bytes = 0
    while piece := stream.readline(PIECE_BYTES):
        num_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return num_bytes


def _parse(
    line: bytes, file: int, row: int, text_field: str, max_document_bytes: int | None
) -> Document | Rejected | None:
    """Parse a line; None for a blank one."""
    try:
        content = line.removeprefix(BYTE_ORDER_MARK).decode()
        if content.isspace() or not content:
            return None
        fields = json.loads(content)
    except UnicodeDecodeError as error:
        return Rejected(file, row, "invalid UTF-8", f"{error.reason} at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        # Not error.colno: it would count into the line break, which is part of the content.
        column = min(error.pos, len(error.doc.rstrip())) + 1
        return Rejected(file, row, "broken JSON", f"{error.msg} at column {column}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        return Rejected(file, row, "broken JSON", str(error))
    if not isinstance(fields, dict):
        return Rejected(file, row, "broken JSON", f"must be an object, not a {type(fields).__name__}")
    if text_field not in fields:
        return Rejected(file, row, "missing field", f"no {text_field!r} among {list(fields)}")
    text = fields[text_field]
    if text is not None and not isinstance(text, str):
        return Rejected(file, row, "not text", f"{text_field!r} holds a {type(text).__name__}")
    return checked_document(text or "", file, row, max_document_bytes)


JSONL = JsonLines()

"""Text files: one document each, byte for byte."""

from __future__ import annotations

from typing import Any, Literal

from distllm.config.data_schema import Source
from distllm.data.sources.documents import (
    InputFile,
    Rejected,
    Rows,
    Unit,
    checked_document,
    too_long,
    unreadable,
)
from distllm.data.sources.source_kind import SourceKind


class Text(SourceKind):
    def identity(self, source: Source) -> dict[str, Any]:
        return {}

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        return read_text(files[file].path, file, max_document_bytes)


def read_text(
    path: str, file: int, max_document_bytes: int | None, errors: Literal["strict", "replace"] = "strict"
) -> Rows:
    try:
        # In binary: text mode would turn \r\n and \r into \n. Unbuffered: no second copy.
        with open(path, "rb", buffering=0) as stream:
            num_bytes = stream.seek(0, 2)
            if max_document_bytes is not None and num_bytes > max_document_bytes:
                yield too_long(file, 0, num_bytes, max_document_bytes)
                return 1
            stream.seek(0)
            text = stream.readall().decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        yield Rejected(file, 0, "invalid UTF-8", f"{error.reason} at byte {error.start}")
        return 1
    except OSError as error:
        yield unreadable(file, error)
        return 0
    yield checked_document(text, file, 0, max_document_bytes)
    return 1


TEXT = Text()

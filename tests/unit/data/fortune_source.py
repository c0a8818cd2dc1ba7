"""A kind of source that is not distllm's: files of the program `fortune`, documents between lines of %."""

from __future__ import annotations

from pathlib import Path

from distllm.config.data_schema import Source
from distllm.config.registry import SOURCES
from distllm.data.sources.documents import InputFile, Rows, Unit, checked_document
from distllm.data.sources.source_kind import SourceKind


class Fortune(SourceKind):
    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        texts = Path(files[file].path).read_text().split("\n%\n")
        for row, text in enumerate(texts):
            yield checked_document(text, file, row, max_document_bytes)
        return len(texts)


SOURCES.register("fortune", Fortune())

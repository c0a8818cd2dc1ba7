"""The common part of Parquet and Arrow files: a table in parts, with a column of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.sources.documents import InputFile, Rejected, Rows, Unit, unreadable
from distllm.data.sources.ranges import Range, grouped
from distllm.data.sources.source_kind import SourceKind

if TYPE_CHECKING:
    import pyarrow as pa

# Of each part: its place, its number of rows if known, and its text in pieces.
Parts: TypeAlias = "Iterator[tuple[str, int | None, Iterator[pa.Array]]]"


class Tables(SourceKind, ABC):
    """A format of tables; every method raises one of `columns.READ_ERRORS` for a broken file."""

    @abstractmethod
    def schema(self, path: str) -> pa.Schema:
        """Return the columns, without reading a row."""

    @abstractmethod
    def part_sizes(self, path: str) -> list[int]:
        """Return the sizes of the parts, in any unit; [] where the parts cannot be told apart."""

    @abstractmethod
    def parts(self, path: str, text_field: str, start: int | None, stop: int | None) -> Parts:
        """Read the parts [start, stop), or all."""

    def check_files(self, source: Source, files: list[InputFile]) -> None:
        """Check that some file has the text. User error: none has, so the name must be wrong.

        Unreadable files are ignored here.
        """
        from distllm.data.sources.columns import READ_ERRORS, column_problem

        problems = []
        for file in files:
            try:
                problem = column_problem(self.schema(file.path), source.text_field)
            except READ_ERRORS:
                continue
            if problem is None:
                return
            problems.append(f"{file.path}: {problem[1]}")
        if problems:
            rule = f"a file must have it as a column of text; {problems[0]}"
            fix = "data.text_field=NAME with the column of the text"
            raise user_error("data.text_field", source.text_field, rule, fix)

    def ranges(self, source: Source, file: InputFile, unit_bytes: int) -> Iterator[Range]:
        from distllm.data.sources.columns import READ_ERRORS, column_problem

        try:
            if column_problem(self.schema(file.path), source.text_field):
                return
            sizes = self.part_sizes(file.path)
        except READ_ERRORS:
            return  # `read` reports it
        scale = file.num_bytes / max(1, sum(sizes))
        yield from grouped([int(size * scale) for size in sizes], unit_bytes)

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        """Read rows; a broken part is left out."""
        from distllm.data.sources.columns import (
            READ_ERRORS,
            column_problem,
            decoded_document,
            encoded_texts,
        )

        path, row = files[file].path, 0
        try:
            problem = column_problem(self.schema(path), source.text_field)
            if problem:
                yield Rejected(file, None, *problem)
                return 0
            for place, num_rows, columns in self.parts(path, source.text_field, unit.start, unit.stop):
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

"""What the rest of the package knows of a kind of source: a new kind is one file beside this one, and one
line of the table SOURCES (`distllm/config/registry.py`).

A mistake in the settings is answered within a second: what takes long to import (pyarrow, datasets) is
imported in the functions that read, not at the top of a kind's file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from distllm.config.data_schema import Source
from distllm.config.problems import Problem
from distllm.config.registry import SOURCES
from distllm.data.sources.documents import InputFile, Rows, Unit
from distllm.data.sources.files import files_of, has_changed, is_matched, matching_paths
from distllm.data.sources.ranges import Range


class SourceKind:
    """As it stands, a kind of files that `source.path` names by a glob, each of them read whole; such a kind
    needs no more than `read`.

    is_tokenized: the one file is the .bin of a pair of token files that another tool made; it is used as it
        is, and neither planned nor read.
    counts_lines: a row is a line, and the quarantine says its number too.
    """

    is_tokenized = False
    counts_lines = False

    def problems(self, place: str, source: Source) -> Iterator[Problem]:
        """What the settings get wrong, without a look at any file. place: the setting that holds `source`."""
        if not source.path:
            rule = f"is required for {place}.source={source.source}"
            yield Problem(f"{place}.path", source.path, rule, f"{place}.path='FOLDER/**/*', a glob of files")

    def environment_problems(self, place: str, source: Source) -> Iterator[Problem]:
        """What this machine lacks; of settings with `problems`, nothing."""
        if source.path and not is_matched(source.path):
            rule = f"must match files; none does, seen from {os.getcwd()}"
            fix = f"{place}.path='FOLDER/**/*.txt', quoted for the shell"
            yield Problem(f"{place}.path", source.path, rule, fix)

    def list_files(self, source: Source) -> list[InputFile]:
        """The files that hold the documents, in an order that does not change.

        User errors: no file matches, or only empty ones.
        """
        return files_of(required_path(source), matching_paths(required_path(source)))

    def identity(self, source: Source) -> dict[str, Any]:
        """What decides, beside files, subset and split, which documents there are: it enters the cache's key.

        What is forgotten here lets two corpora that differ share one place in the cache.
        """
        return {"text_field": source.text_field}

    def check_files(self, source: Source, files: list[InputFile]) -> None:
        """User error: the files are not what `source` says of them. Called before they are cut into units."""

    def ranges(self, source: Source, file: InputFile, unit_bytes: int) -> Iterator[Range]:
        """Cut a file of more than `unit_bytes` into ranges; none if it must be read whole.

        A function of the file alone: every machine must cut it alike.
        """
        yield from ()

    def changed_file(self, source: Source, files: list[InputFile]) -> InputFile | None:
        """The first of `files` that is not what it was when it was listed, if that can be told."""
        return next((file for file in files if file.modified_ns is not None and has_changed(file)), None)

    def may_be_blank(self, file: InputFile) -> bool:
        """Whether a file that gives no row, but is not without a byte, is nothing bad."""
        return False

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        """The rows of `files[file]`, or of the range [unit.start, unit.stop) of it.

        What cannot be used becomes `Rejected`, and is never fatal.
        """
        raise NotImplementedError(f"{type(self).__name__} reads no documents")


def kind_of(source: Source) -> SourceKind:
    kind = SOURCES[source.source]
    assert isinstance(kind, SourceKind), f"SOURCES must hold source kinds, not {kind!r} as {source.source}"
    return kind


def required_path(source: Source) -> str:
    assert source.path is not None, f"`problems` must refuse data.source={source.source} without source.path"
    return source.path

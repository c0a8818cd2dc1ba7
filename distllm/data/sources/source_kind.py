"""The interface of a kind of sources: a new kind is one file beside this one, and one line of the table
SOURCES (`distllm/config/registry.py`).

A mistake in the settings must be reported within a second: modules that are slow to import (pyarrow,
datasets) are imported in the functions that read, not at the top of a kind's file.
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
    """A kind of sources. By default its files match the glob `source.path` and each is read whole; such a
    kind needs no more than `read`.

    is_tokenized: the one file is the .bin of a pair of token files that another tool made; it is used as it
        is, and neither planned nor read.
    counts_lines: a row is a line, and the quarantine gives its number too.
    """

    is_tokenized = False
    counts_lines = False

    def problems(self, place: str, source: Source) -> Iterator[Problem]:
        """Find mistakes in the settings alone; reads no file. place: the setting that holds `source`."""
        if not source.path:
            rule = f"is required for {place}.source={source.source}"
            yield Problem(f"{place}.path", source.path, rule, f"{place}.path='FOLDER/**/*', a glob of files")

    def environment_problems(self, place: str, source: Source) -> Iterator[Problem]:
        """Find what this machine lacks; not called for settings with `problems`."""
        if source.path and not is_matched(source.path):
            rule = f"must match files; none does, seen from {os.getcwd()}"
            fix = f"{place}.path='FOLDER/**/*.txt', quoted for the shell"
            yield Problem(f"{place}.path", source.path, rule, fix)

    def list_files(self, source: Source) -> list[InputFile]:
        """List the files that hold the documents, in a stable order.

        User errors: no file matches, or only empty ones.
        """
        return files_of(required_path(source), matching_paths(required_path(source)))

    def identity(self, source: Source) -> dict[str, Any]:
        """Return what determines the documents beside files, subset and split; it enters the cache's key.

        If something is missing here, two corpora that differ share one place in the cache.
        """
        return {"text_field": source.text_field}

    def check_files(self, source: Source, files: list[InputFile]) -> None:
        """Check the files against `source`; else a user error. Called before they are cut into units."""

    def ranges(self, source: Source, file: InputFile, unit_bytes: int) -> Iterator[Range]:
        """Cut a file of more than `unit_bytes` into ranges; none if it must be read whole.

        A function of the file alone: every machine must cut it alike.
        """
        yield from ()

    def changed_file(self, source: Source, files: list[InputFile]) -> InputFile | None:
        """Return the first of `files` that has changed since it was listed, if that can be determined."""
        return next((file for file in files if file.modified_ns is not None and has_changed(file)), None)

    def may_be_blank(self, file: InputFile) -> bool:
        """Return whether a file that holds bytes but gives no row is acceptable."""
        return False

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        """Read the rows of `files[file]`, or of the range [unit.start, unit.stop) of it.

        Rows that cannot be used become `Rejected`, and are never fatal.
        """
        # Of a kind whose tokens are made already nobody asks it; any other must override it.
        raise AssertionError(f"{type(self).__name__} does not say how its documents are read")


def kind_of(source: Source) -> SourceKind:
    kind = SOURCES[source.source]
    assert isinstance(kind, SourceKind), f"SOURCES must hold source kinds, not {kind!r} as {source.source}"
    return kind


def required_path(source: Source) -> str:
    assert source.path is not None, f"`problems` must refuse data.source={source.source} without source.path"
    return source.path

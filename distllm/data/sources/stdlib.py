"""The Python standard library of the running interpreter: real text that exists on every machine."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distllm.config.data_schema import Source
from distllm.config.problems import Problem
from distllm.data.sources.documents import InputFile, Rows, Unit
from distllm.data.sources.files import input_file
from distllm.data.sources.source_kind import SourceKind
from distllm.data.sources.text import read_text


class StandardLibrary(SourceKind):
    def problems(self, place: str, source: Source) -> Iterator[Problem]:
        if source.path is not None:
            rule = f"must be null for {place}.source={source.source}, which finds its files itself"
            fix = "data=text, data=jsonl or data=parquet, with this data.path"
            yield Problem(f"{place}.path", source.path, rule, fix)

    def environment_problems(self, place: str, source: Source) -> Iterator[Problem]:
        yield from ()

    def list_files(self, source: Source) -> list[InputFile]:
        folder = Path(sysconfig.get_paths()["stdlib"])
        installed = {"site-packages", "dist-packages"}
        paths = sorted(f for f in folder.rglob("*.py") if not installed & set(f.relative_to(folder).parts))
        return [input_file(path) for path in paths]

    def identity(self, source: Source) -> dict[str, Any]:
        return {"python": sys.version}

    def read(
        self, source: Source, files: list[InputFile], file: int, unit: Unit, max_document_bytes: int | None
    ) -> Rows:
        # A few of the library's own test files are broken on purpose or declare another encoding.
        return read_text(files[file].path, file, max_document_bytes, errors="replace")


STDLIB = StandardLibrary()

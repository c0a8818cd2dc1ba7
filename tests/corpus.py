"""Reads a source whole, unit by unit, as the preparation does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distllm.config.data_schema import Source
from distllm.data.sources import Document, Rejected, UnitEnd, list_files, plan_units, read_unit

WHOLE = 1 << 40

# What must survive byte for byte: dates, line ends, scripts, emoji, combining marks, right to left, code.
TEXTS = [
    "2020-01-01",
    "a\r\nb\rc\n",
    "日本 🎉\u2028\x85 x",
    '{"x": 1}',
    "e\u0301 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u202e\u05e2\u05d1\u05e8 ไทย 👩\u200d👧 \U0001f1e6",
    "def f(x):\n\treturn '\\\\n' + \"\\u0041\" # \x00\x7f\n",
    "last\n\n",
]


def source(
    kind: str,
    path: Path | str | None,
    text_field: str = "text",
    subset: str | None = None,
    split: str = "train",
) -> Source:
    return Source(kind, None if path is None else str(path), text_field, subset, split)


def read(
    source: Source, unit_bytes: int = WHOLE, max_document_bytes: int | None = None
) -> list[Document | Rejected]:
    """All documents and rejected rows, the rows counted from the start of their files."""
    files = list_files(source)
    results: list[Document | Rejected] = []
    earlier_rows = dict.fromkeys(range(len(files)), 0)
    for unit in plan_units(source, files, unit_bytes):
        *rows, end = read_unit(source, files, unit, max_document_bytes)
        assert isinstance(end, UnitEnd)
        for row in rows:
            assert isinstance(row, Document | Rejected)
            assert unit.first_file <= row.file < unit.end_file
            if unit.start is not None and row.row is not None:
                assert row.row < end.num_rows
                row = replace(row, row=row.row + earlier_rows[row.file])
            results.append(row)
        if unit.start is not None:
            earlier_rows[unit.first_file] += end.num_rows
    return results


def texts(results: list[Document | Rejected]) -> list[str]:
    assert all(isinstance(result, Document) for result in results), results
    return [result.text for result in results if isinstance(result, Document)]


def places(results: list[Document | Rejected]) -> list[tuple[int | None, str]]:
    """Each row with its text, or with the reason for which it is rejected."""
    return [(r.row, r.text if isinstance(r, Document) else r.reason) for r in results]

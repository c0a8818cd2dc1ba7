"""Cut a large file into ranges: (start, stop, num_bytes) of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

Range: TypeAlias = tuple[int, int, int]


def even_ranges(end: int, num_bytes: int, unit_bytes: int) -> Iterator[Range]:
    """Cut [0, end), which holds `num_bytes`, in steps of about `unit_bytes`."""
    step = max(1, end * unit_bytes // num_bytes)
    for start in range(0, end, step):
        stop = min(start + step, end)
        yield start, stop, num_bytes * stop // end - num_bytes * start // end


def grouped(sizes: Sequence[int], unit_bytes: int) -> Iterator[Range]:
    """Group the parts of a file, given their bytes, into ranges of about `unit_bytes`."""
    start, num_bytes = 0, 0
    for index, size in enumerate(sizes):
        if index > start and num_bytes + size > unit_bytes:
            yield start, index, num_bytes
            start, num_bytes = index, 0
        num_bytes += size
    if start < len(sizes):
        yield start, len(sizes), num_bytes

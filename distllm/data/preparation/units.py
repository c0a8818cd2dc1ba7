"""The size of a corpus's units."""

from __future__ import annotations

from distllm.data.sources import InputFile

MOST_UNITS = 4096  # unless they reach the largest size: any cache can hold a few thousand files
SMALLEST_BYTES, LARGEST_BYTES = 4 << 20, 1 << 30


def unit_bytes_of(files: list[InputFile]) -> int:
    """Return the size of a unit, from the corpus alone, so that every machine cuts it alike."""
    total = sum(file.num_bytes for file in files)
    return min(max(total // MOST_UNITS, SMALLEST_BYTES), LARGEST_BYTES)

"""How large the units of a corpus are."""

from __future__ import annotations

from distllm.data.sources import InputFile

MOST_UNITS = 4096  # unless they grew beyond the largest: a few thousand files are no burden to any cache
SMALLEST_BYTES, LARGEST_BYTES = 4 << 20, 1 << 30


def unit_bytes_of(files: list[InputFile]) -> int:
    """By the corpus alone, so that every machine cuts it alike, however many take part."""
    total = sum(file.num_bytes for file in files)
    return min(max(total // MOST_UNITS, SMALLEST_BYTES), LARGEST_BYTES)

"""The work of reading, cut into units that do not depend on who reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distllm.config.data_schema import Source
from distllm.data.sources import jsonl
from distllm.data.sources.documents import InputFile, Unit


def plan_units(source: Source, files: list[InputFile], unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes` each; the documents of all of them, in order, are the corpus in order.

    A function of the files alone. Small files share a unit; a larger one is cut into ranges, where its format
    allows. User error: no file has the column `text_field`.
    """
    assert unit_bytes > 0, "a unit needs a size"
    assert source.source != "megatron", "token files are used as they are"
    units: list[Unit] = []
    first_file, num_bytes = 0, 0  # of the whole files that wait to become a unit
    for index, file in enumerate(files):
        ranges = list(_ranges(source, file, unit_bytes)) if file.num_bytes > unit_bytes else []
        if index > first_file and (len(ranges) > 1 or num_bytes + file.num_bytes > unit_bytes):
            units.append(Unit(first_file, index, None, None, num_bytes))
            first_file, num_bytes = index, 0
        if len(ranges) > 1:
            units += [Unit(index, index + 1, start, stop, size) for start, stop, size in ranges]
            first_file = index + 1
        else:
            num_bytes += file.num_bytes
    if first_file < len(files):
        units.append(Unit(first_file, len(files), None, None, num_bytes))
    return units


def _ranges(source: Source, file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, num_bytes) of the units of one large file; none if it must be read whole."""
    if source.source == "jsonl" and not jsonl.is_packed(file.path):
        for start in range(0, file.num_bytes, unit_bytes):
            stop = min(start + unit_bytes, file.num_bytes)
            yield start, stop, stop - start


def grouped(sizes: Sequence[int], unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Parts of a file, by their sizes, in ranges (start, stop, num_bytes) of about `unit_bytes`."""
    start, num_bytes = 0, 0
    for index, size in enumerate(sizes):
        if index > start and num_bytes + size > unit_bytes:
            yield start, index, num_bytes
            start, num_bytes = index, 0
        num_bytes += size
    if start < len(sizes):
        yield start, len(sizes), num_bytes

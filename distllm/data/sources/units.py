"""The work of reading, cut into units that do not depend on who reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.sources import huggingface, packed, tables
from distllm.data.sources.documents import InputFile, Unit


def plan_units(source: Source, files: list[InputFile], unit_bytes: int) -> list[Unit]:
    """Units of about `unit_bytes` each; the documents of all of them, in order, are the corpus in order.

    A function of the files alone. Small files share a unit; a larger one is cut into ranges, where its format
    allows. User error: no file has the column `text_field`.
    """
    assert unit_bytes > 0, "a unit needs a size"
    assert source.source != "megatron", "token files are used as they are"
    _check_column(source, files)
    # A shard of unknown size is a unit of its own; that an empty file is empty is known.
    unknown_bytes = unit_bytes + 1 if source.source == "huggingface" else 0
    units: list[Unit] = []
    first_file, num_bytes = 0, 0  # of the whole files that wait to become a unit
    for index, file in enumerate(files):
        ranges = list(_ranges(source, file, unit_bytes)) if file.num_bytes > unit_bytes else []
        full = num_bytes + (file.num_bytes or unknown_bytes) > unit_bytes
        if index > first_file and (len(ranges) > 1 or full):
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
    if source.source == "jsonl" and not packed.is_packed(file.path):
        yield from _even_ranges(file.num_bytes, file.num_bytes, unit_bytes)
    elif source.source == "parquet" or source.source == "arrow":
        try:
            if tables.column_problem(tables.read_schema(file.path, source.source), source.text_field):
                return
            sizes = tables.part_sizes(file.path, source.source)
        except tables.READ_ERRORS:
            return  # read_unit will tell
        scale = file.num_bytes / max(1, sum(sizes))
        yield from _grouped([int(size * scale) for size in sizes], unit_bytes)
    elif source.source == "huggingface":
        num_rows = huggingface.num_rows(source)
        if num_rows is not None:
            yield from _even_ranges(num_rows, file.num_bytes, unit_bytes)


def _even_ranges(end: int, num_bytes: int, unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """[0, end), which are `num_bytes`, in steps of about `unit_bytes`."""
    step = max(1, end * unit_bytes // num_bytes)
    for start in range(0, end, step):
        stop = min(start + step, end)
        yield start, stop, num_bytes * stop // end - num_bytes * start // end


def _grouped(sizes: Sequence[int], unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Parts of a file, by their bytes, in ranges of about `unit_bytes`."""
    start, num_bytes = 0, 0
    for index, size in enumerate(sizes):
        if index > start and num_bytes + size > unit_bytes:
            yield start, index, num_bytes
            start, num_bytes = index, 0
        num_bytes += size
    if start < len(sizes):
        yield start, len(sizes), num_bytes


def _check_column(source: Source, files: list[InputFile]) -> None:
    """User error: no file has the text, so that the name must be wrong. Unreadable files say nothing."""
    if source.source != "parquet" and source.source != "arrow":
        return
    problems = []
    for file in files:
        try:
            problem = tables.column_problem(tables.read_schema(file.path, source.source), source.text_field)
        except tables.READ_ERRORS:
            continue
        if problem is None:
            return
        problems.append(f"{file.path}: {problem[1]}")
    if problems:
        rule = f"a file must have it as a column of text; {problems[0]}"
        fix = "data.text_field=NAME with the column of the text"
        raise user_error("data.text_field", source.text_field, rule, fix)

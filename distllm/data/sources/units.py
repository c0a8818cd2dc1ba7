"""Cut the work of reading a source of any kind into units that do not depend on who reads them."""

from __future__ import annotations

from collections.abc import Iterator

from distllm.config.data_schema import Source
from distllm.data.sources.documents import Document, InputFile, Rejected, Rows, Unit, UnitEnd
from distllm.data.sources.source_kind import kind_of


def list_files(source: Source) -> list[InputFile]:
    """List the files of a source. User errors: those of the kind's `list_files`."""
    return kind_of(source).list_files(source)


def plan_units(source: Source, files: list[InputFile], unit_bytes: int) -> list[Unit]:
    """Plan units of about `unit_bytes` each; their documents, in order, are the corpus in order.

    A function of the files alone. Small files share a unit; a larger one is cut into ranges, where its format
    allows. User error: no file has the column `text_field`.
    """
    kind = kind_of(source)
    assert unit_bytes > 0, "a unit needs a size"
    assert not kind.is_tokenized, "token files are used as they are"
    kind.check_files(source, files)
    units: list[Unit] = []
    first_file, num_bytes = 0, 0  # of the whole files of the unit being collected
    for index, file in enumerate(files):
        ranges = list(kind.ranges(source, file, unit_bytes)) if file.num_bytes > unit_bytes else []
        # A file of unknown size is a unit of its own, since it may be large.
        is_full = file.modified_ns is None or num_bytes + file.num_bytes > unit_bytes
        if index > first_file and (len(ranges) > 1 or is_full):
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


def read_unit(
    source: Source, files: list[InputFile], unit: Unit, max_document_bytes: int | None
) -> Iterator[Document | Rejected | UnitEnd]:
    """Yield all documents and rejected rows of `unit`, in order, then one `UnitEnd`.

    Holds one batch of rows in memory, and nothing of a document beyond a small multiple of
    `max_document_bytes` where the format allows.
    """
    kind = kind_of(source)
    num_rows = 0
    for file in range(unit.first_file, unit.end_file):
        rows = kind.read(source, files, file, unit, max_document_bytes)
        must_have_rows = files[file].num_bytes == 0 or not kind.may_be_blank(files[file])
        # The end of a range may be blank in a file that is not.
        is_whole = unit.start is None
        num_rows += yield from _told_if_empty(rows, file) if is_whole and must_have_rows else rows
    yield UnitEnd(num_rows)


def _told_if_empty(rows: Rows, file: int) -> Rows:
    """Yield `rows`; a whole file that gives nothing at all, not even a bad row, is rejected."""
    is_empty = True
    while True:
        try:
            row = next(rows)
        except StopIteration as end:
            if is_empty:
                yield Rejected(file, None, "empty", "the file holds no document")
            return int(end.value)
        is_empty = False
        yield row

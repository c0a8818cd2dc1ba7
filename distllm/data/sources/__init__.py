"""The documents of a source, in a fixed order: files sorted by path, rows as they stand in the file.

`list_files` finds the files, `plan_units` cuts them into units of work, `read_unit` reads one, anywhere. A
unit ends with `UnitEnd`, which holds its number of rows: the rows of a range of a file are counted from the
start of the range, so the true row is the sum of the rows of the file's earlier units plus the row told. The
rows of whole files are counted from the start of each. A blank JSON line is a row: row + 1 is the line.

They are the same for every kind of source; what a kind does its own way is in `source_kind.py`.
"""

from distllm.data.sources.documents import Document, InputFile, Rejected, Unit, UnitEnd
from distllm.data.sources.source_kind import SourceKind, kind_of
from distllm.data.sources.units import list_files, plan_units, read_unit

__all__ = [
    "Document",
    "InputFile",
    "Rejected",
    "SourceKind",
    "Unit",
    "UnitEnd",
    "kind_of",
    "list_files",
    "plan_units",
    "read_unit",
]

"""The documents of a source, in a fixed order: files sorted by path, rows as they stand in the file.

`list_files` finds the files, `plan_units` cuts them into units of work, `read_unit` reads one, anywhere. A
unit ends with `UnitEnd`, which holds its number of rows: the rows of a range of a file are counted from the
start of the range, so the true row is the sum of the rows of the file's earlier units plus the row told. The
rows of whole files are counted from the start of each. A blank JSON line is a row: row + 1 is the line.
"""

from distllm.data.sources.documents import Document, InputFile, Rejected, Unit, UnitEnd
from distllm.data.sources.files import list_files
from distllm.data.sources.reading import read_unit
from distllm.data.sources.units import plan_units

__all__ = [
    "Document",
    "InputFile",
    "Rejected",
    "Unit",
    "UnitEnd",
    "list_files",
    "plan_units",
    "read_unit",
]

"""The types that readers take and return: input files, units of work, documents and rejected rows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

LONGEST_DETAIL = 200


@dataclass(frozen=True)
class InputFile:
    """An input file.

    path: absolute; of a Hugging Face data set "NAME[/SUBSET]:SPLIT" and the shard.
    num_bytes: 0 where unknown. modified_ns: time of the last change; None where both are unknown.
    """

    path: str
    num_bytes: int
    modified_ns: int | None


@dataclass(frozen=True)
class Unit:
    """The work of one reader at a time: whole files, or a range of one file.

    first_file, end_file: the files, as indices into the list of files, end_file excluded.
    start, stop: None, or the range of the one file: bytes of plain JSON lines, row groups of Parquet, record
        batches of Arrow, rows of a saved Hugging Face data set.
    num_bytes: its share of the input, for progress.
    """

    first_file: int
    end_file: int
    start: int | None
    stop: int | None
    num_bytes: int


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    text: can always be encoded as UTF-8, never empty. file: index into the list of files.
    row: counted from 0 from the start of the file, or of the unit if that is a range of the file.
    """

    text: str
    file: int
    row: int


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. row: as in `Document`; None for the file, or all of it that follows.

    reason: one of a few fixed words. detail: where and why, in at most LONGEST_DETAIL characters.
    """

    file: int
    row: int | None
    reason: str
    detail: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", self.detail[:LONGEST_DETAIL])


@dataclass(frozen=True)
class UnitEnd:
    """The end marker of a unit. num_rows: of the unit, blank JSON lines and rejected rows included."""

    num_rows: int


# The iterator over one file, or a range of it; it returns the number of rows.
Rows: TypeAlias = Generator[Document | Rejected, None, int]


def checked_document(text: str, file: int, row: int, max_document_bytes: int | None) -> Document | Rejected:
    """Return `text` as a document that can be encoded; an empty or too long one is rejected."""
    if not text:
        return Rejected(file, row, "empty", "")
    if not text.isascii():
        text = _encodable(text)
    # No character takes more than 4 bytes: most documents need not be encoded to see that they are short.
    if max_document_bytes is not None and 4 * len(text) > max_document_bytes:
        num_bytes = len(text.encode())
        if num_bytes > max_document_bytes:
            return too_long(file, row, num_bytes, max_document_bytes)
    return Document(text, file, row)


def too_long(file: int, row: int | None, num_bytes: int, max_bytes: int, what: str = "text") -> Rejected:
    return Rejected(file, row, "too long", f"{what} of {num_bytes:,} bytes, {max_bytes:,} allowed")


def unreadable(file: int, error: BaseException, place: str = "") -> Rejected:
    """Reject the rest of a file. place: how far it could be read, such as "after line 7"."""
    detail = f"{type(error).__name__}: {error}"
    return Rejected(file, None, "unreadable file", f"{place}: {detail}" if place else detail)


def _encodable(text: str) -> str:
    """Replace unpaired UTF-16 surrogates, which JSON can hold and no tokenizer takes, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", errors="surrogatepass").decode("utf-16-le", errors="replace")
    return text

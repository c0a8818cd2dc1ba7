"""Packed files as streams of bytes, where every byte before a broken place can be read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER_BYTES = 1 << 20
PIECE_BYTES = 1 << 16

# Errors of opening and reading a broken or unreadable file; gzip's and pyarrow's are OSErrors.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _open_zstd(path: str) -> pa.NativeFile:
    import pyarrow as pa  # Python has no zstd of its own before 3.14

    return pa.CompressedInputStream(pa.OSFile(path), "zstd")


OPENERS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zstd,
}


def is_packed(path: str) -> bool:
    return Path(path).suffix.lower() in OPENERS


def open_unpacked(path: str) -> BinaryIO:
    """Open a file, unpacked by its suffix; members or frames that follow each other are joined."""
    if not is_packed(path):
        return open(path, "rb", buffering=BUFFER_BYTES)
    return io.BufferedReader(_Pieces(OPENERS[Path(path).suffix.lower()](path)), BUFFER_BYTES)


class _Pieces(io.RawIOBase):
    """Reads `packed` in small pieces, so that an error loses only the piece in which it occurs."""

    def __init__(self, packed: Any) -> None:
        self._packed = packed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._packed.read1(min(len(buffer), PIECE_BYTES))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._packed.close()
        super().close()

"""The storage of checkpoints: the few operations that they need of a file system, named as in fsspec.

Everything in this package goes through a `Storage`, so that an object store can be added: its class needs
these methods and nothing else.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol


class Storage(Protocol):
    """A file system for checkpoints; its methods raise OSError when they fail."""

    def create(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """Create a file to write sequentially; it is durable when the context is left without an error."""

    def read(self, path: Path) -> AbstractContextManager[BinaryIO]:
        """Open a file to read."""

    def map(self, path: Path) -> AbstractContextManager[bytearray | mmap.mmap]:
        """Return a file's content as a private writable buffer, if possible read as it is touched."""

    def is_file(self, path: Path) -> bool: ...

    def size(self, path: Path) -> int: ...

    def ls(self, path: Path) -> list[Path]:
        """List a folder's direct entries, in any order; empty if the folder does not exist."""

    def makedirs(self, path: Path) -> None: ...

    def mv(self, source: Path, target: Path) -> None:
        """Rename a folder durably; readers see all of it under one of the two names."""

    def rm(self, path: Path) -> None:
        """Remove a file or a folder with all that it holds; it may be missing."""


class LocalStorage:
    """Local and shared (POSIX) file systems."""

    @contextmanager
    def create(self, path: Path) -> Iterator[BinaryIO]:
        with open(path, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def read(self, path: Path) -> Iterator[BinaryIO]:
        with open(path, "rb") as stream:
            yield stream

    @contextmanager
    def map(self, path: Path) -> Iterator[mmap.mmap]:
        with open(path, "rb") as stream:
            # Copy on write: PyTorch warns of buffers that it must not write to. Not closed here: tensors may
            # still refer to it, and it is freed with the last of them.
            yield mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def is_file(self, path: Path) -> bool:
        return path.is_file()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def ls(self, path: Path) -> list[Path]:
        return list(path.iterdir()) if path.is_dir() else []

    def makedirs(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def mv(self, source: Path, target: Path) -> None:
        for folder, _, _ in os.walk(source):
            _sync_folder(Path(folder))
        os.rename(source, target)
        _sync_folder(target.parent)

    def rm(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


LOCAL = LocalStorage()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Sizes and hashes of files. DCP has none: it silently loads flipped bits and files of another step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from distllm.checkpoint.storage import Storage

READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """The expected state of a file. bytes: its size. xxh3_128: hash of its content."""

    bytes: int
    xxh3_128: str


class HashingStream:
    """A write-only stream that hashes what is written; it is written sequentially."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._num_bytes += memoryview(data).nbytes
        return self._stream.write(data)

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        self._stream.flush()

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._num_bytes, self._hash.hexdigest())


@contextmanager
def create_hashed(storage: Storage, path: Path) -> Iterator[HashingStream]:
    """Create a file with `storage.create`; its `record` is complete at the end."""
    with storage.create(path) as stream:
        yield HashingStream(stream)


def hash_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def size_damage_of(storage: Storage, path: Path, record: FileRecord) -> str | None:
    """Compare a file with `record` without reading it; return the difference, None if there is none."""
    if not storage.is_file(path):
        return "is missing"
    if storage.size(path) != record.bytes:
        return f"has {storage.size(path)} bytes, was written with {record.bytes}"
    return None


def damage_of(storage: Storage, path: Path, record: FileRecord) -> str | None:
    """Compare a file with `record` by reading all of it; return the difference, None if there is none."""
    if damage := size_damage_of(storage, path, record):
        return damage
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(READ_BYTES))
    with storage.read(path) as stream:
        while size := stream.readinto(buffer):  # type: ignore[attr-defined]  # every binary stream has it
            digest.update(buffer[:size])
    return None if digest.hexdigest() == record.xxh3_128 else "its content was altered"

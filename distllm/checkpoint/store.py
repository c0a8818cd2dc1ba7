"""One checkpoint on disk: written whole or not at all, and verified before it is believed.

The folder is written as `<name>.tmp`; its manifest, with size and hash of every file, comes last; then the
folder is renamed. So a folder without a manifest does not exist for us, whenever the job was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from distllm.checkpoint.dcp import LoadPlanner, SavePlanner, pieces_of
from distllm.layout.fragment import Fragment

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """bytes: size of the file. xxh3_128: hash of its content."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. `details`: whatever the trainer puts beside the tensors, as JSON."""

    format_version: int
    step: int
    scalars: dict[str, float]
    details: dict[str, Any]
    files: dict[str, FileRecord]


def write_checkpoint(
    path: Path, fragments: list[Fragment], *, step: int, scalars: dict[str, float], details: dict[str, Any]
) -> None:
    """Collective. Afterwards `path` is a complete checkpoint; before that it does not exist."""
    temporary = path.with_name(path.name + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill; DCP would mix its files with ours
        temporary.mkdir(parents=True)
    dist.barrier()
    file_system = _HashingFileSystem()
    writer = FileSystemWriter(temporary, sync_files=True)
    writer.fs = file_system
    dcp.save(
        pieces_of(fragment for fragment in fragments if fragment.writer),
        storage_writer=writer,
        planner=SavePlanner(),
    )
    records = _gather(file_system.records)
    if dist.get_rank() == 0:
        manifest = Manifest(FORMAT_VERSION, step, scalars, details, records)
        _write_durably(temporary / MANIFEST, json.dumps(asdict(manifest), indent=1))
        _sync_folder(temporary)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one that the start has passed over
        os.rename(temporary, path)
        _sync_folder(path.parent)
    dist.barrier()


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint; OSError, ValueError or KeyError where there is none that makes sense."""
    raw = json.loads((path / MANIFEST).read_text())
    if raw["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {raw['format_version']}, this program reads {FORMAT_VERSION}")
    files = {name: FileRecord(**record) for name, record in raw["files"].items()}
    return Manifest(raw["format_version"], raw["step"], raw["scalars"], raw["details"], files)


def find_damage(path: Path) -> str | None:
    """Read all of a checkpoint and say what is wrong with it; None means it is good."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error!r}"
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name}: is missing"
        if file.stat().st_size != record.bytes:
            return f"{name}: has {file.stat().st_size} bytes, was written with {record.bytes}"
        if _hash_file(file) != record.xxh3_128:
            return f"{name}: its content was altered"
    return None


def read_metadata(path: Path) -> Metadata:
    """Names, shapes and types of the tensors of a checkpoint."""
    return dcp.FileSystemReader(path).read_metadata()


def read_tensors(path: Path, fragments: list[Fragment]) -> None:
    """Fill the fragments' tensors in place from the checkpoint at `path`. Collective."""
    dcp.load(pieces_of(fragments), storage_reader=dcp.FileSystemReader(path), planner=LoadPlanner())


class _HashingFileSystem(FileSystem):
    """DCP's file system that hashes what it writes; DCP itself has no checksums."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing
            name = os.path.basename(str(path)).removesuffix(".tmp")  # DCP writes its metadata beside its name
            self.records[name] = FileRecord(hashing.num_bytes, hashing.hash.hexdigest())


class _HashingStream:
    """A write-only stream; torch.save and DCP write strictly forward, so a running hash is enough."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.hash = xxhash.xxh3_128()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.num_bytes += memoryview(data).nbytes
        written: int = self._stream.write(data)
        return written

    def seek(self, *_: Any) -> None:
        raise RuntimeError("a checkpoint file is written strictly forward")

    def __getattr__(self, name: str) -> Any:  # tell, flush, fileno
        return getattr(self._stream, name)


def _gather(records: dict[str, FileRecord]) -> dict[str, FileRecord]:
    per_rank: list[dict[str, FileRecord]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(per_rank, records)
    return {name: record for part in per_rank for name, record in sorted(part.items())}


def _hash_file(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while data := stream.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _write_durably(file: Path, text: str) -> None:
    with open(file, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""One checkpoint on disk: written whole or not at all, by all ranks in parallel, each byte once.

    step_00000020.tmp/            becomes step_00000020 once everything in it is durable
      shards/rank_00003.distcp    what rank 3 wrote
      tensors/<module>/.metadata  where the pieces of a module lie (a DCP folder)
      tokenizer/...               and other attachments
      manifest.json               written last, with size and hash of every other file

A module's metadata is assembled on the first rank of its pipeline stage, and read one module at a time: no
rank ever holds the list of all pieces, which has millions of entries for a large job.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from distllm.checkpoint.dcp import METADATA, Buffer, Record, read_metadata, read_pieces, write_metadata
from distllm.checkpoint.dcp import write_pieces as write_records
from distllm.checkpoint.integrity import FileRecord, create_hashed
from distllm.checkpoint.manifest import FORMAT_VERSION, MANIFEST, Manifest, to_text
from distllm.checkpoint.pieces import WEIGHT, Piece, pieces_of
from distllm.checkpoint.storage import LOCAL, Storage
from distllm.layout.fragment import Fragment
from distllm.layout.place import Shape, module_of
from distllm.layout.save_groups import SaveGroups
from distllm.layout.tree import Tree

T = TypeVar("T")
TENSORS, SHARDS = "tensors", "shards"
DEFAULT_GROUPS = SaveGroups()


class SaveFailedError(Exception):
    """A checkpoint could not be written; raised on all ranks, with the first failing rank and its error."""


@dataclass(frozen=True)
class Contents:
    """The content of a checkpoint beside the tensors; attachments: {path in its folder: content}."""

    step: int
    scalars: Mapping[str, float]
    details: Mapping[str, Any]
    attachments: Mapping[str, bytes] = field(default_factory=dict)


@dataclass
class _Described:
    """One rank's report to rank 0 for the manifest."""

    tensors: dict[str, Shape] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    def add(self, other: _Described) -> None:
        self.tensors |= other.tensors
        self.states |= other.states
        self.files |= other.files

    def combined(self, other: _Described) -> _Described:
        self.add(other)
        return self


def write_checkpoint(
    path: Path,
    fragments: Iterable[Fragment],
    *,
    step: int,
    scalars: Mapping[str, float],
    details: Mapping[str, Any],
    attachments: Mapping[str, bytes] | None = None,
    groups: SaveGroups = DEFAULT_GROUPS,
) -> None:
    """Write the current content of the fragments. Collective; see `write_pieces`."""
    pieces = pieces_of(fragment for fragment in fragments if fragment.writer)
    write_pieces(path, pieces, Contents(step, scalars, details, attachments or {}), groups)


def write_pieces(
    path: Path,
    pieces: Sequence[Piece],
    contents: Contents,
    groups: SaveGroups = DEFAULT_GROUPS,
    storage: Storage = LOCAL,
) -> None:
    """Write this rank's pieces as its part of the checkpoint. Collective over `groups.world`.

    Afterwards `path` is a complete checkpoint; before that, and after a SaveFailedError, `path` is unchanged.
    """
    rank, temporary = dist.get_rank(), path.with_name(path.name + ".tmp")
    try:
        attached = _together(groups, lambda: _open_folder(temporary, contents, storage) if rank == 0 else {})
        records, described = _together(groups, lambda: _write_shard(temporary, rank, pieces, storage))
        described.files |= attached
        modules = _gather_by_module(records, groups.stage)
        described.add(_together(groups, lambda: _write_modules(temporary, modules, storage)))
        total = groups.world.combine(described, _Described.combined)
        _together(groups, lambda: _commit(temporary, path, contents, total, storage) if total else None)
    except SaveFailedError:
        if rank == 0:
            with suppress(OSError):  # a leftover is not a checkpoint, and the next save removes it
                storage.rm(temporary)
        raise


def read_tensors(path: Path, fragments: Iterable[Fragment], storage: Storage = LOCAL) -> None:
    """Fill the fragments' tensors in place from the checkpoint at `path`; not collective."""
    by_module: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces_of(fragments):
        by_module[module_of(piece.name)].append(piece)
    for module, pieces in by_module.items():
        _read_module(path, module, pieces, storage)


def _read_module(path: Path, module: str, pieces: Sequence[Piece], storage: Storage) -> None:
    """Read the pieces of one module.

    Its metadata is freed before that of the next module is read: both together would need a third more
    memory.
    """
    with storage.read(path / TENSORS / module / METADATA) as stream:
        metadata = read_metadata(stream)
    with ExitStack() as opened:

        @cache
        def shard(file: str) -> Buffer:
            return opened.enter_context(storage.map(path / SHARDS / Path(file).name))

        read_pieces(metadata, pieces, shard)


def _together(groups: SaveGroups, work: Callable[[], T]) -> T:
    """Do `work` on every rank; if it fails on one, all of them raise: else they would wait for that one.

    Errors of the disk become a SaveFailedError; torch.save turns them into a RuntimeError. Others are bugs.
    """
    result, disk_error, bug = None, None, None
    try:
        result = work()
    except (OSError, RuntimeError) as caught:
        disk_error = f"rank {dist.get_rank()}: {caught!r}"
    except Exception as caught:
        bug = f"rank {dist.get_rank()}: {caught!r}"
    bug, disk_error = groups.world.agree((bug, disk_error), _first_of_each)
    if bug:
        raise AssertionError(bug)
    if disk_error:
        raise SaveFailedError(disk_error)
    return result  # type: ignore[return-value]


def _first_of_each(
    a: tuple[str | None, str | None], b: tuple[str | None, str | None]
) -> tuple[str | None, str | None]:
    return a[0] or b[0], a[1] or b[1]


def _open_folder(folder: Path, contents: Contents, storage: Storage) -> dict[str, FileRecord]:
    """Make an empty folder with the attachments."""
    storage.rm(folder)  # left by a killed process
    storage.makedirs(folder / SHARDS)
    records = {}
    for name, content in contents.attachments.items():
        storage.makedirs((folder / name).parent)
        with create_hashed(storage, folder / name) as stream:
            stream.write(content)
        records[name] = stream.record
    return records


def _write_shard(
    folder: Path, rank: int, pieces: Sequence[Piece], storage: Storage
) -> tuple[list[Record], _Described]:
    if not pieces:
        return [], _Described()
    file = f"{SHARDS}/rank_{rank:05}.distcp"
    with create_hashed(storage, folder / file) as stream:
        records = write_records(stream, f"../../{file}", pieces)
    return records, _Described(files={file: stream.record})


def _gather_by_module(records: Sequence[Record], stage: Tree) -> dict[str, list[Record]]:
    """Return all records of the ranks of this stage by module on the first of them, none on others."""
    gathered = stage.combine(list(records), operator.add) or []
    by_module: dict[str, list[Record]] = defaultdict(list)
    for record in gathered:
        by_module[module_of(record.name)].append(record)
    return by_module


def _write_modules(folder: Path, modules: Mapping[str, Sequence[Record]], storage: Storage) -> _Described:
    described = _Described()
    for module, records in modules.items():
        file = f"{TENSORS}/{module}/{METADATA}"
        storage.makedirs((folder / file).parent)
        with create_hashed(storage, folder / file) as stream:
            write_metadata(stream, records)
        described.files[file] = stream.record
        for record in records:
            described.tensors[record.name] = record.global_shape
            if record.state != WEIGHT:
                described.states[record.state] = str(record.dtype).removeprefix("torch.")
    return described


def _commit(temporary: Path, path: Path, contents: Contents, total: _Described, storage: Storage) -> None:
    """Write the manifest, and then give the folder its final name."""
    manifest = Manifest(
        FORMAT_VERSION,
        contents.step,
        dict(contents.scalars),
        dict(contents.details),
        total.tensors,
        total.states,
        total.files,
    )
    with storage.create(temporary / MANIFEST) as stream:
        stream.write(to_text(manifest).encode())
    storage.rm(path)  # a damaged one that was skipped at the start
    storage.mv(temporary, path)

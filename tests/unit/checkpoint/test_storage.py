"""The interface to file systems is all that checkpoints need: they work on one without files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]
from harness import run_ranks

from distllm.checkpoint.manifest import find_damage, read_manifest
from distllm.checkpoint.pieces import pieces_of
from distllm.checkpoint.retention import checkpoint_path, list_checkpoints, remove_old
from distllm.checkpoint.store import Contents, read_tensors, write_pieces
from distllm.config.schema import Checkpoint
from distllm.layout.fragment import Fragment
from distllm.layout.place import Place
from distllm.layout.save_groups import SaveGroups


class MemoryStorage:
    """`Storage` on fsspec's file system in memory, as one on an object store would be written."""

    def __init__(self) -> None:
        self._files = MemoryFileSystem(skip_instance_cache=True)

    @contextmanager
    def create(self, path: Path) -> Iterator[BinaryIO]:
        with self._files.open(str(path), "wb") as stream:
            yield cast(BinaryIO, stream)

    @contextmanager
    def read(self, path: Path) -> Iterator[BinaryIO]:
        with self._files.open(str(path), "rb") as stream:
            yield cast(BinaryIO, stream)

    @contextmanager
    def map(self, path: Path) -> Iterator[bytearray]:
        yield bytearray(self._files.cat(str(path)))

    def is_file(self, path: Path) -> bool:
        return bool(self._files.isfile(str(path)))

    def size(self, path: Path) -> int:
        return int(self._files.size(str(path)))

    def ls(self, path: Path) -> list[Path]:
        return [Path(name) for name in self._files.ls(str(path), detail=False)] if self._exists(path) else []

    def makedirs(self, path: Path) -> None:
        self._files.makedirs(str(path), exist_ok=True)

    def mv(self, source: Path, target: Path) -> None:
        self._files.mv(str(source), str(target), recursive=True)

    def rm(self, path: Path) -> None:
        if self._exists(path):
            self._files.rm(str(path), recursive=True)

    def _exists(self, path: Path) -> bool:
        return bool(self._files.exists(str(path)))


def save_and_load_in_memory(rank: int) -> None:
    storage, folder = MemoryStorage(), Path("/bucket/checkpoints")
    place = Place("layer.weight", (5, 7), (5, 7), (0, 0), primary=True)
    weight, found = torch.arange(35.0), torch.zeros(35)
    for step in (1, 2, 3):
        fragment = Fragment(place, 0, 35, {"weight": weight + step}, writer=True)
        contents = Contents(step, {"step": float(step)}, {}, {"tokenizer/tokenizer.json": b"{}"})
        write_pieces(checkpoint_path(folder, step), pieces_of([fragment]), contents, SaveGroups(), storage)
    newest = checkpoint_path(folder, 3)
    settings = Checkpoint(
        interval=1, keep=2, keep_every=0, async_save=False, timeout_seconds=1, resume="auto"
    )
    assert remove_old(newest, settings, storage) == [checkpoint_path(folder, 1)]
    assert list_checkpoints(folder, storage) == [checkpoint_path(folder, 2), newest]
    assert find_damage(newest, storage) is None
    assert read_manifest(newest, storage).step == 3
    read_tensors(newest, [Fragment(place, 0, 35, {"weight": found}, writer=False)], storage)
    assert torch.equal(found, weight + 3)
    with storage.create(newest / "tokenizer/tokenizer.json") as stream:
        stream.write(b"[]")
    assert find_damage(newest, storage) == "tokenizer/tokenizer.json: its content was altered"
    assert not folder.exists(), "something went past the interface"


def test_checkpoints_live_in_memory() -> None:
    run_ranks(1, save_and_load_in_memory)

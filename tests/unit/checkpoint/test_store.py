"""A checkpoint on disk is believed only when it is whole: every damage is found and its file named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distllm.checkpoint.store import (
    MANIFEST,
    find_damage,
    read_manifest,
    read_metadata,
    read_tensors,
    write_checkpoint,
)
from distllm.layout.fragment import Fragment
from distllm.layout.place import Place

SHARD = "__0_0.distcp"
PLACE = Place("layer.weight", (5, 7), (5, 7), (0, 0), primary=True)


def values() -> Tensor:
    return torch.arange(35, dtype=torch.float32)


def fragments(weight: Tensor, writer: bool = True) -> list[Fragment]:
    """In three ranges, as ZeRO would cut it; none is a box."""
    return [
        Fragment(PLACE, start, stop, {"weight": weight[start:stop]}, writer)
        for start, stop in ((0, 9), (9, 10), (10, 35))
    ]


def write_and_read(rank: int, path: Path) -> Tensor:
    write_checkpoint(path, fragments(values()), step=3, scalars={"step": 3.0}, details={"a": [1, None]})
    weight = torch.zeros(35)
    read_tensors(path, fragments(weight))
    return weight


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "checkpoints" / "step_00000003"
    assert torch.equal(run_ranks(1, write_and_read, path)[0], values())
    return path


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / written.name))


def test_a_written_checkpoint_is_whole(written: Path) -> None:
    assert find_damage(written) is None
    assert [path.name for path in written.parent.iterdir()] == [written.name]
    manifest = read_manifest(written)
    assert (manifest.step, manifest.scalars, manifest.details) == (3, {"step": 3.0}, {"a": [1, None]})
    assert {path.name for path in written.iterdir()} == {MANIFEST, *manifest.files}
    assert set(manifest.files) == {SHARD, ".metadata"}
    ((name, tensor),) = read_metadata(written).state_dict_metadata.items()
    assert isinstance(tensor, TensorStorageMetadata)
    assert (name, tuple(tensor.size), len(tensor.chunks)) == ("weight/layer.weight", (5, 7), 5)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (cut, "bytes, was written with"),
        (append, "bytes, was written with"),
        (flip, "its content was altered"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("name", [SHARD, ".metadata"])
def test_a_damaged_file_is_named(
    name: str, harm: Callable[[Path], None], complaint: str, checkpoint: Path
) -> None:
    harm(checkpoint / name)
    damage = find_damage(checkpoint)
    assert damage is not None
    assert damage.startswith(f"{name}: ")
    assert complaint in damage


def test_every_bit_counts(checkpoint: Path) -> None:
    """Any single bit of a shard, at its ends, in the headers and in the tensors."""
    file = checkpoint / SHARD
    content = file.read_bytes()
    for position in [0, len(content) - 1, *range(0, len(content), 97)]:
        altered = bytearray(content)
        altered[position] ^= 0x80
        file.write_bytes(altered)
        assert find_damage(checkpoint) == f"{SHARD}: its content was altered", position


def test_a_manifest_cut_anywhere_is_damage(checkpoint: Path) -> None:
    content = (checkpoint / MANIFEST).read_bytes()
    for length in range(len(content)):
        (checkpoint / MANIFEST).write_bytes(content[:length])
        damage = find_damage(checkpoint)
        assert damage is not None, length
        assert damage.startswith(f"{MANIFEST}: "), length


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format_version": 1}', "\udcff"])
def test_a_manifest_that_makes_no_sense_is_damage(text: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    damage = find_damage(checkpoint)
    assert damage is not None
    assert damage.startswith(f"{MANIFEST}: ")


def test_a_newer_format_is_refused_by_its_version(checkpoint: Path) -> None:
    content = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(content | {"format_version": 2}))
    damage = find_damage(checkpoint)
    assert damage is not None
    assert "format version 2, this program reads 1" in damage


def test_a_folder_that_is_not_there_is_damage(tmp_path: Path) -> None:
    damage = find_damage(tmp_path / "absent")
    assert damage is not None
    assert damage.startswith(f"{MANIFEST}: FileNotFoundError")


def read_with_a_hole(rank: int, path: Path) -> None:
    """The writer left out the elements 9 and 10: a reader must not go on with what it had there."""
    write_checkpoint(path, fragments(values())[::2], step=1, scalars={}, details={})
    with pytest.raises(CheckpointException, match="does not cover"):
        read_tensors(path, fragments(torch.zeros(35)))


def write_on_every_rank(rank: int, path: Path) -> None:
    with pytest.raises(CheckpointException, match="overlapping chunks"):
        write_checkpoint(path, fragments(values()), step=1, scalars={}, details={})
    assert not path.exists()


def test_holes_and_duplicates_are_refused(tmp_path: Path) -> None:
    """What DCP alone would let pass: both are errors of ours that must not become wrong weights."""
    run_ranks(1, read_with_a_hole, tmp_path / "step_00000001")
    run_ranks(2, write_on_every_rank, tmp_path / "step_00000002")

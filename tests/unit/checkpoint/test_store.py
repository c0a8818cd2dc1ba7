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
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distllm.checkpoint.dcp import read_metadata
from distllm.checkpoint.integrity import hash_text
from distllm.checkpoint.manifest import FORMAT_VERSION, HASH, MANIFEST, find_damage, read_manifest
from distllm.checkpoint.store import read_tensors, write_checkpoint
from distllm.config.problems import UserError
from distllm.layout.fragment import Fragment
from distllm.layout.place import Place

SHARD = "shards/rank_00000.distcp"
METADATA = "tensors/layer/.metadata"
TOKENIZER = "tokenizer/tokenizer.json"
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
    write_checkpoint(
        path,
        fragments(values()),
        step=3,
        scalars={"step": 3.0},
        details={"a": [1, None]},
        attachments={TOKENIZER: b"{}"},
    )
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
    assert (manifest.tensors, manifest.states) == ({"layer.weight": (5, 7)}, {})
    files = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert files == {MANIFEST, *manifest.files}
    assert set(manifest.files) == {SHARD, METADATA, TOKENIZER}
    assert (
        manifest.num_bytes
        == sum(path.stat().st_size for path in written.rglob("*.*") if path.is_file())
        - (written / MANIFEST).stat().st_size
    )
    with open(written / METADATA, "rb") as stream:
        ((name, tensor),) = read_metadata(stream).state_dict_metadata.items()
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
@pytest.mark.parametrize("name", [SHARD, METADATA, TOKENIZER])
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


@pytest.mark.parametrize("text", ["", "[]", "3", f'{{"format_version": {FORMAT_VERSION}}}', "\udcff"])
def test_a_manifest_that_makes_no_sense_is_damage(text: str, checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    damage = find_damage(checkpoint)
    assert damage is not None
    assert damage.startswith(f"{MANIFEST}: ")


def test_every_bit_of_the_manifest_counts(checkpoint: Path) -> None:
    """It vouches for all other files, and so for itself; also where it stays valid JSON."""
    content = (checkpoint / MANIFEST).read_bytes()
    num_valid = 0
    for position in range(0, len(content), 7):
        altered = bytearray(content)
        altered[position] ^= 1
        (checkpoint / MANIFEST).write_bytes(altered)
        try:
            damage = find_damage(checkpoint)
        except UserError:  # another version: only with its hash is it believed
            pytest.fail(f"byte {position}")
        assert damage is not None, position
        num_valid += "altered" in damage
    assert num_valid > 20


@pytest.mark.parametrize(("version", "age"), [(FORMAT_VERSION + 1, "a newer"), (1, "an older")])
@pytest.mark.parametrize("has_hash", [True, False])
def test_another_format_is_refused_and_not_passed_over(
    version: int, age: str, has_hash: bool, checkpoint: Path
) -> None:
    """It is no damage: to resume from an earlier checkpoint would lose its work. Version 1 had no hash."""
    content = json.loads((checkpoint / MANIFEST).read_text()) | {"format_version": version}
    del content[HASH]
    if has_hash:
        content[HASH] = hash_text(json.dumps(content, sort_keys=True))
    (checkpoint / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"format version {version} was written by {age} distllm"):
        find_damage(checkpoint)


def test_shares_together_look_at_every_file(checkpoint: Path) -> None:
    flip(checkpoint / SHARD)
    found = [find_damage(checkpoint, share=(index, 2)) for index in (0, 1)]
    assert sorted(damage is None for damage in found) == [False, True]


def test_a_folder_that_is_not_there_is_damage(tmp_path: Path) -> None:
    damage = find_damage(tmp_path / "absent")
    assert damage is not None
    assert damage.startswith(f"{MANIFEST}: FileNotFoundError")


def write_with_a_hole(rank: int, path: Path) -> None:
    """The writer leaves out the elements 9 and 10."""
    with pytest.raises(AssertionError, match=r"34 of 35 elements of weight/layer\.weight"):
        write_checkpoint(path, fragments(values())[::2], step=1, scalars={}, details={})
    assert not path.exists()


def write_on_every_rank(rank: int, path: Path) -> None:
    with pytest.raises(AssertionError, match=r"weight/layer\.weight was written twice"):
        write_checkpoint(path, fragments(values()), step=1, scalars={}, details={})
    assert not path.exists()


def test_holes_and_duplicates_are_refused(tmp_path: Path) -> None:
    """What DCP alone would let pass: both are errors of ours that must not become wrong weights."""
    run_ranks(1, write_with_a_hole, tmp_path / "step_00000001")
    run_ranks(2, write_on_every_rank, tmp_path / "step_00000002")

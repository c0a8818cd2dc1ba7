"""What is told of a folder of checkpoints, and what pruning would take from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from distllm.checkpoint.integrity import FileRecord
from distllm.checkpoint.manifest import FORMAT_VERSION, MANIFEST, Manifest, damages, find_damage, to_text
from distllm.checkpoint.retention import checkpoint_path
from distllm.checkpoint.survey import look_at, plan_pruning, survey
from distllm.config.problems import UserError
from distllm.config.schema import Checkpoint

FILES = {"shards/rank_00000.distcp": b"weights", "tensors/layer/.metadata": b"places"}
SHARD, METADATA = FILES


def make_checkpoint(folder: Path, step: int, version: int = FORMAT_VERSION) -> Path:
    path = checkpoint_path(folder, step)
    records = {}
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True)
        (path / name).write_bytes(content)
        records[name] = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    manifest = Manifest(version, step, {}, details={}, tensors={}, states={}, files=records)
    (path / MANIFEST).write_text(to_text(manifest))
    return path


def flip(path: Path) -> None:
    """Same size, other content: only reading finds it."""
    (path / SHARD).write_bytes(b"WEIGHTS")


def settings(keep: int, keep_every: int = 0) -> Checkpoint:
    return Checkpoint(
        interval=1, keep=keep, keep_every=keep_every, async_save=False, timeout_seconds=1, resume="auto"
    )


def test_every_state_is_told_newest_last(tmp_path: Path) -> None:
    for step in (100_000_00, 2, 3, 4, 5, 6):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 7, version=FORMAT_VERSION + 1)
    make_checkpoint(tmp_path, 8).rename(tmp_path / "step_00000008.tmp")
    (checkpoint_path(tmp_path, 3) / SHARD).write_bytes(b"weight")
    (checkpoint_path(tmp_path, 4) / METADATA).unlink()
    (checkpoint_path(tmp_path, 5) / MANIFEST).unlink()
    flip(checkpoint_path(tmp_path, 6))
    (tmp_path / "best").mkdir()
    (tmp_path / "step_1").mkdir()
    found = {entry.step: (entry.state, *entry.problems) for entry in survey(tmp_path)}
    assert list(found) == [2, 3, 4, 5, 6, 7, 8, 100_000_00]
    assert found[2] == found[6] == found[100_000_00] == ("complete",)
    assert found[3] == ("damaged", f"{SHARD}: has 6 bytes, was written with 7")
    assert found[4] == ("damaged", f"{METADATA}: is missing")
    assert found[5][0] == "damaged"
    assert found[5][1].startswith(f"{MANIFEST}: FileNotFoundError")
    assert found[7][0] == "other format"
    assert "was written by a newer distllm" in found[7][1]
    assert found[8] == ("unfinished",)


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert survey(tmp_path / "nowhere") == []
    assert plan_pruning(tmp_path / "nowhere", settings(1)).removed == []


def test_reading_finds_all_that_is_wrong(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    flip(path)
    (path / METADATA).unlink()
    assert look_at(path).problems == (f"{METADATA}: is missing",)
    assert look_at(path, thorough=True).problems == (
        f"{SHARD}: its content was altered",
        f"{METADATA}: is missing",
    )
    assert list(damages(path, share=(1, 2))) == [f"{METADATA}: is missing"]


def test_the_size_is_that_on_disk(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    (path / "not in the manifest").write_bytes(b"12345")
    size = (path / MANIFEST).stat().st_size + 5 + sum(map(len, FILES.values()))
    assert look_at(path).num_bytes == size


def test_a_checkpoint_of_any_name_knows_its_step(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 12).rename(tmp_path / "best")
    assert look_at(path).step == 12
    (path / MANIFEST).unlink()
    assert look_at(path).step is None


@pytest.mark.parametrize("text", ["3", '"a"', "[]", "null", "true"])
def test_a_manifest_that_is_no_object_is_damage(text: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    (path / MANIFEST).write_text(text)
    assert (find_damage(path) or "").startswith(f"{MANIFEST}: ")


def test_another_format_is_no_damage_that_is_passed_over(tmp_path: Path) -> None:
    """A UserError is a ValueError, too: as damage, a resume would go on from an earlier checkpoint."""
    path = make_checkpoint(tmp_path, 1, version=FORMAT_VERSION + 1)
    with pytest.raises(UserError, match="newer distllm"):
        find_damage(path)


def names(paths: list[Path]) -> list[int]:
    return [int(path.name.removeprefix("step_").removesuffix(".tmp")) for path in paths]


@pytest.mark.parametrize(
    ("keep", "keep_every", "bad", "kept", "for_good", "doubtful", "removed"),
    [
        (2, 0, (), [6, 5], [], [], [4, 3, 2, 1]),
        (1, 2, (), [6], [4, 2], [], [5, 3, 1]),
        (2, 3, (), [6, 5], [3], [], [4, 2, 1]),
        (9, 0, (), [6, 5, 4, 3, 2, 1], [], [], []),
        # damaged ones do not count, and stay where only they are newer
        (1, 0, (6,), [5], [], [6], [4, 3, 2, 1]),
        (2, 0, (6, 4), [5, 3], [], [6, 4], [2, 1]),
        (2, 2, (6, 5), [4, 3], [2], [6, 5], [1]),
        # older than what is kept, nobody asks whether it is good
        (1, 2, (4, 3), [6], [4, 2], [], [5, 3, 1]),
        # the last good one is never removed, however far back
        (1, 0, (6, 5, 4, 3, 2), [1], [], [6, 5, 4, 3, 2], []),
        (3, 0, (6, 5, 4, 3, 2), [1], [], [6, 5, 4, 3, 2], []),
        (1, 0, (6, 5, 4, 3, 2, 1), [], [], [6, 5, 4, 3, 2, 1], []),
    ],
)
def test_good_ones_are_counted_from_the_newest_back(
    keep: int,
    keep_every: int,
    bad: tuple[int, ...],
    kept: list[int],
    for_good: list[int],
    doubtful: list[int],
    removed: list[int],
    tmp_path: Path,
) -> None:
    for step in range(1, 7):
        make_checkpoint(tmp_path, step)
    for step in bad:
        flip(checkpoint_path(tmp_path, step))
    plan = plan_pruning(tmp_path, settings(keep, keep_every))
    assert names(plan.kept) == kept
    assert names(plan.for_good) == for_good
    assert names(list(plan.doubtful)) == doubtful
    assert names(plan.removed) == removed


def test_unfinished_saves_go_and_other_formats_stay(tmp_path: Path) -> None:
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 3, version=1)
    for step in (2, 4):
        (tmp_path / f"step_0000000{step}.tmp").mkdir()
    (tmp_path / "notes.tmp").mkdir()
    plan = plan_pruning(tmp_path, settings(1))
    assert names(plan.kept) == [2]
    assert "older distllm" in plan.doubtful[checkpoint_path(tmp_path, 3)]
    assert {path.name for path in plan.removed} == {"step_00000001", "step_00000002.tmp", "step_00000004.tmp"}


def test_the_hash_of_another_format_is_looked_at_first(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 1)
    content = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(content | {"format_version": 9}))
    assert look_at(path).state == "damaged"

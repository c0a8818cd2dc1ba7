"""Which checkpoints exist, which one a start takes, and which may go; on folders without any tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from distllm.checkpoint.integrity import FileRecord
from distllm.checkpoint.manifest import FORMAT_VERSION, MANIFEST, Manifest, find_damage, to_text
from distllm.checkpoint.retention import (
    Choice,
    candidates,
    checkpoint_path,
    choose,
    list_checkpoints,
    remove_old,
)
from distllm.checkpoint.storage import LocalStorage
from distllm.config.problems import UserError
from distllm.config.schema import Checkpoint

SHARD = "__0_0.distcp"
CONTENT = b"tensors"


def make_checkpoint(folder: Path, step: int) -> Path:
    path = checkpoint_path(folder, step)
    path.mkdir(parents=True)
    (path / SHARD).write_bytes(CONTENT)
    files = {SHARD: FileRecord(len(CONTENT), xxhash.xxh3_128_hexdigest(CONTENT))}
    manifest = Manifest(FORMAT_VERSION, step, {"step": step}, details={}, tensors={}, states={}, files=files)
    (path / MANIFEST).write_text(to_text(manifest))
    return path


def damage(path: Path) -> None:
    (path / SHARD).write_bytes(CONTENT.upper())
    assert find_damage(path) is not None


def settings(resume: str = "auto", keep: int = 1, keep_every: int = 0) -> Checkpoint:
    return Checkpoint(
        interval=1, keep=keep, keep_every=keep_every, async_save=False, timeout_seconds=1, resume=resume
    )


def choose_checkpoint(folder: Path, settings: Checkpoint) -> Choice:
    return choose(candidates(folder, settings))


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def test_only_folders_with_a_manifest_exist(tmp_path: Path) -> None:
    """Whatever a kill or a user left beside them: each stands here as it would be found."""
    make_checkpoint(tmp_path, 100)
    make_checkpoint(tmp_path, 20)
    (make_checkpoint(tmp_path, 30) / MANIFEST).unlink()
    make_checkpoint(tmp_path, 40).rename(tmp_path / "step_00000040.tmp")
    make_checkpoint(tmp_path, 50).rename(tmp_path / "best")
    (tmp_path / "step_00000060").write_text("a file")
    assert steps(tmp_path) == [20, 100]
    assert choose_checkpoint(tmp_path, settings("auto")).path == checkpoint_path(tmp_path, 100)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_without_checkpoints_a_run_starts_afresh(resume: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        choice = choose_checkpoint(folder, settings(resume))
        assert (choice.path, choice.damaged) == (None, ())


def test_never_refuses_a_run_with_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        choose_checkpoint(tmp_path, settings("never"))
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("checkpoint.resume", "never")
    assert f"{tmp_path} holds 1" in problem.rule


def test_damaged_ones_are_passed_over_and_named(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 1)
    for step in (2, 3):
        damage(make_checkpoint(tmp_path, step))
    choice = choose_checkpoint(tmp_path, settings("auto"))
    assert choice.path == good
    assert choice.damaged == tuple(f"step_0000000{n}: {SHARD}: its content was altered" for n in (3, 2))


def test_damage_behind_a_good_one_is_not_looked_for(tmp_path: Path) -> None:
    """To read every checkpoint at each start would take long; the newest good one is enough."""
    damage(make_checkpoint(tmp_path, 1))
    newest = make_checkpoint(tmp_path, 2)
    choice = choose_checkpoint(tmp_path, settings("auto"))
    assert (choice.path, choice.damaged) == (newest, ())


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    """To start afresh in silence would throw the run away."""
    for step in (1, 2):
        damage(make_checkpoint(tmp_path, step))
    with pytest.raises(UserError) as caught:
        choose_checkpoint(tmp_path, settings("auto"))
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("checkpoint", tmp_path)
    assert all(f"step_0000000{step}: {SHARD}" in problem.rule for step in (1, 2))


def test_a_named_checkpoint_is_where_a_new_run_starts(tmp_path: Path) -> None:
    elsewhere = make_checkpoint(tmp_path / "other", 7)
    assert choose_checkpoint(tmp_path / "run", settings(str(elsewhere))).path == elsewhere


def test_a_run_that_started_elsewhere_goes_on_with_its_own(tmp_path: Path) -> None:
    """The same command again: it must not fall back to where it once started."""
    elsewhere = make_checkpoint(tmp_path / "other", 7)
    own = make_checkpoint(tmp_path / "run", 8)
    assert choose_checkpoint(tmp_path / "run", settings(str(elsewhere))).path == own


@pytest.mark.parametrize("is_damaged", [True, False])
def test_a_named_checkpoint_must_be_whole(is_damaged: bool, tmp_path: Path) -> None:
    named = checkpoint_path(tmp_path / "other", 7)
    if is_damaged:
        damage(make_checkpoint(tmp_path / "other", 7))
    with pytest.raises(UserError) as caught:
        choose_checkpoint(tmp_path / "run", settings(str(named)))
    (problem,) = caught.value.problems
    assert (problem.setting, problem.value) == ("checkpoint", named.parent)
    assert (SHARD if is_damaged else MANIFEST) in problem.rule


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (3, [10, 20, 30]), (9, [10, 20, 30])])
def test_the_newest_stay(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    remove_old(checkpoint_path(tmp_path, 30), settings(keep=keep))
    assert steps(tmp_path) == left


@pytest.mark.parametrize(
    ("keep_every", "left"),
    [(20, [20, 40, 50]), (30, [30, 50]), (50, [50]), (7, [50]), (10, [10, 20, 30, 40, 50])],
)
def test_some_stay_for_good(keep_every: int, left: list[int], tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        make_checkpoint(tmp_path, step)
    remove_old(checkpoint_path(tmp_path, 50), settings(keep=1, keep_every=keep_every))
    assert steps(tmp_path) == left


def test_damaged_ones_of_later_steps_push_no_good_one_out(tmp_path: Path) -> None:
    """Resumed from 10 because 30 is damaged; 20 was just written and must survive."""
    for step in (10, 20):
        make_checkpoint(tmp_path, step)
    damage(make_checkpoint(tmp_path, 30))
    remove_old(checkpoint_path(tmp_path, 20), settings(keep=1))
    assert steps(tmp_path) == [20, 30]
    assert choose_checkpoint(tmp_path, settings("auto")).path == checkpoint_path(tmp_path, 20)


def test_what_killed_saves_left_goes_and_nothing_else(tmp_path: Path) -> None:
    newest = make_checkpoint(tmp_path, 30)
    make_checkpoint(tmp_path, 20).rename(tmp_path / "step_00000020.tmp")
    make_checkpoint(tmp_path, 10).rename(tmp_path / "best")
    remove_old(newest, settings(keep=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", newest.name]


class DiesWhileRemoving(LocalStorage):
    def rm(self, path: Path) -> None:
        (path / MANIFEST).unlink()
        raise KeyboardInterrupt


def test_a_kill_while_an_old_one_goes_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    for step in (10, 20):
        make_checkpoint(tmp_path, step)
    with pytest.raises(KeyboardInterrupt):
        remove_old(checkpoint_path(tmp_path, 20), settings(keep=1), DiesWhileRemoving())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010.tmp", "step_00000020"]
    remove_old(checkpoint_path(tmp_path, 20), settings(keep=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]

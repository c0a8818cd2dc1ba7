"""What disks do to checkpoints: they fill up, cannot be read, hold other formats; and two jobs meet."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, ForkedJob, fork
from runs import SMALL_RUN, curve, events, read_rows, status, wait_for_steps, write_corpus

STEPS = 12
RUN = (*SMALL_RUN, f"train.steps={STEPS}", "checkpoint.interval=4", "checkpoint.keep=1", "zero.stage=0")
CHECKPOINT_BYTES = 2_900_000  # of the tiny model: 234,000 parameters x 12 bytes
NOBODY = 65534


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus and the uninterrupted run `whole`."""
    folder = tmp_path_factory.mktemp("disk")
    write_corpus(folder)
    assert train(folder, "whole").exit_code == 0
    return folder


def train(folder: Path, run: str, *overrides: str, **options: Any) -> Finished:
    return fork(folder, "train", *RUN, f"run.dir={run}", *overrides, **options)


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A run directory on a disk with room for one checkpoint and a bit."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


@pytest.mark.parametrize("is_async", [True, False])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    is_async: bool, folder: Path, small_disk: Path
) -> None:
    """All steps are done although the second save and the third fail; the first checkpoint stays good, and
    once there is room the same command finishes the run from it."""
    assert CHECKPOINT_BYTES < 5 << 20 < 2 * CHECKPOINT_BYTES
    settings = ("disk", f"checkpoint.async_save={is_async}")
    result = train(folder, *settings)
    assert result.exit_code == 1
    assert "step 8: no checkpoint could be written, training goes on without: rank 0: " in result.stderr
    assert curve(small_disk) == curve(folder / "whole"), "training went on"
    failures = events(small_disk, "checkpoint failed")
    assert [event["step"] for event in failures] == [8, 12]
    assert all("rank 0: " in event["reason"] for event in failures)
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_00000004"]
    assert status(small_disk)["state"] == "failed"
    assert "the last checkpoint could not be written" in status(small_disk)["reason"]

    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    again = train(folder, *settings)
    assert again.exit_code == 0, again.output
    assert "goes on after step 4 of 12" in again.stdout
    assert curve(small_disk) == curve(folder / "whole")
    assert status(small_disk)["state"] == "completed"


def make_room_after_step_10() -> None:
    loop: Any = importlib.import_module("distllm.trainer.loop")
    take_step = loop.take_step

    def making_room(job: Any, state: Any, allowed: Any) -> Any:
        if state.step == 10:
            Path("disk/ballast").unlink()
        return take_step(job, state, allowed)

    loop.take_step = making_room


def test_a_disk_that_was_full_for_a_while(folder: Path, small_disk: Path) -> None:
    """Two saves fail, the third succeeds; what is kept of the run is whole in the end."""
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with open(small_disk / "ballast", "wb") as file, pytest.raises(OSError, match="No space left"):
        file.write(b"x" * (9 << 20))
    # Room to open the run and for its metrics, but for no checkpoint.
    os.truncate(small_disk / "ballast", (small_disk / "ballast").stat().st_size - 40_960)
    result = train(folder, "disk", sabotage=make_room_after_step_10)
    assert result.exit_code == 0, result.output
    assert curve(small_disk) == curve(folder / "whole")
    assert [event["step"] for event in events(small_disk, "checkpoint failed")] == [4, 8]
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_00000012"]
    assert status(small_disk)["state"] == "completed"


def become_nobody() -> None:
    """Who cannot import what lies in root's home; so what is imported late comes first."""
    importlib.import_module("matplotlib.backends.backend_agg")
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def test_an_unreadable_checkpoint_is_passed_over_loudly(folder: Path) -> None:
    """As a user who may not read its shards; permission bits stop everybody but root."""
    run = Path(shutil.copytree(folder / "whole", folder / "unreadable"))
    newest = run / "checkpoints" / "step_00000012"
    older = Path(shutil.copytree(newest, run / "checkpoints" / "step_00000011"))
    for path in (folder, run, folder / "cache", *run.rglob("*"), *(folder / "cache").rglob("*")):
        path.chmod(0o777)
    (newest / "shards").chmod(0)
    with open(newest / "manifest.json") as file:
        assert json.load(file)["step"] == 12
    for parent in folder.parents:
        if parent.stat().st_mode & 0o005 != 0o005 and os.getuid() == 0:
            parent.chmod(parent.stat().st_mode | 0o055)
    try:
        result = train(folder, "unreadable", "train.steps=13", sabotage=become_nobody)
    finally:
        renamed_for_removal = newest.with_name(newest.name + ".tmp")
        (renamed_for_removal / "shards").chmod(0o777)
    assert result.exit_code == 0, result.output
    assert "WARNING: a damaged checkpoint was passed over: step_00000012: shards/rank_00000" in result.stdout
    assert "Permission denied" in result.stdout
    assert "an old checkpoint could not be removed" in result.stderr
    assert f"from {older.relative_to(folder)}" in result.stdout


def test_a_newer_format_stops_the_job(folder: Path) -> None:
    """Not passed over like damage: an older checkpoint would be resumed from and this one's work lost."""
    run = Path(shutil.copytree(folder / "whole", folder / "newer"))
    manifest = run / "checkpoints" / "step_00000012" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["xxh3_128_of_the_rest"]
    manifest.write_text(json.dumps(content | {"format_version": 99}))
    result = train(folder, "newer", "train.steps=13")
    assert result.exit_code == 2
    assert "format version 99 was written by a newer distllm" in result.stderr
    assert curve(run) == curve(folder / "whole")


def test_a_second_job_on_a_run_directory_is_refused(folder: Path) -> None:
    """And the first goes on; once it is gone, killed or not, the next one may."""
    settings = (*RUN, "run.dir=twice", "train.steps=100000", "checkpoint.interval=1000")
    with ForkedJob(folder, "train", *settings) as job:
        wait_for_steps(job, folder / "twice", 2)
        second = fork(folder, "train", *settings)
        assert second.exit_code == 2
        assert "run.dir=twice" in second.stderr
        assert "another job is running in it: {" in second.stderr
        assert f'"pid": {job.processes[0].pid}' in second.stderr
        before = len(read_rows(folder / "twice"))
        wait_for_steps(job, folder / "twice", before + 2)
    assert train(folder, "twice", "train.steps=2").exit_code == 0


def fail_in_the_background() -> None:
    """The first save meets a bug of ours, not a full disk."""
    store: Any = importlib.import_module("distllm.checkpoint.store")

    def failing(*_: Any) -> Any:
        raise KeyError("a bug in the background")

    store._write_modules = failing


def test_an_error_in_the_background_ends_the_job_at_the_next_step(folder: Path) -> None:
    result = train(folder, "bug", "train.steps=100000", sabotage=fail_in_the_background)
    assert result.exit_code == 1
    assert "a bug in the background" in result.stderr
    assert status(folder / "bug")["state"] == "failed"
    assert 4 <= len(curve(folder / "bug")) < 1000

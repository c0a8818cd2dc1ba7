"""A job that does not move says who is to blame, and ends; a slow rank is named while the job goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from by_day import at_night
from commands import Finished, ForkedJob
from runs import SMALL_RUN, curve, events, status, write_corpus

pytestmark = pytest.mark.alone  # what is slow is a matter of seconds

RUN = (*SMALL_RUN, "train.steps=12", "checkpoint.interval=4", "zero.stage=1", "fault.hang_seconds=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    write_corpus(folder)
    (end,) = train(folder, "whole", 1, [])
    assert end.exit_code == 0, end.output
    return folder


def train(folder: Path, run: str, num_ranks: int, inject: list[str], *overrides: str) -> list[Finished]:
    arguments = (*RUN, f"run.dir={run}", f"fault.inject={inject}", *overrides)
    with ForkedJob(folder, "train", *arguments, num_ranks=num_ranks) as job:
        return job.wait(90)


def verdict(run: Path, step: int) -> dict[str, Any]:
    (file,) = run.glob("hang_*.json")
    assert file.name == f"hang_{step}.json"
    return dict(json.loads(file.read_text()))


@pytest.mark.parametrize("layout", at_night(["data", "pipeline"], ["data"]))
def test_a_stopped_rank_is_named_and_the_job_ends(layout: str, folder: Path) -> None:
    """SIGSTOP to rank 1 of 3 or 2 in step 6. Nobody can ask it anything; it is ended too."""
    run, num_ranks = f"stopped {layout}", 3 if layout == "data" else 2
    settings = ("train.global_batch_size=12",) if layout == "data" else ("parallel.pipeline=2",)
    begin = time.monotonic()
    ends = train(folder, run, num_ranks, ["stop:step=6,rank=1"], *settings)
    assert time.monotonic() - begin < 60
    assert [end.exit_code for end in ends] == [-9 if rank == 1 else 1 for rank in range(num_ranks)]
    found = verdict(folder / run, step=6)
    assert found["suspects"] == [1]
    assert "no sign of life" in found["reason"]
    assert found["ranks"]["1"]["seconds_since_last_sign"] > 4
    waiting = found["ranks"]["0"]
    assert waiting["collective"], "rank 0 waits for rank 1"
    assert any("train_step" in place for place in waiting["stack"])
    assert waiting["samples"] == [6 * (12 if layout == "data" else 8), 7 * (12 if layout == "data" else 8)]
    assert status(folder / run)["state"] == "failed"
    assert status(folder / run)["reason"].startswith("hang: no progress for 4 s; suspects: 1 ")
    (event,) = events(folder / run, "hang")
    assert event["step"] == 6


def test_a_stuck_rank_is_named(folder: Path) -> None:
    """Rank 0 lives but sleeps for ever; then the same command goes on, and ends as if nothing had been."""
    ends = train(folder, "stuck", 2, ["hang:step=6,rank=0"])
    assert {end.exit_code for end in ends} == {1}
    found = verdict(folder / "stuck", step=6)
    assert found["suspects"] == [0]
    assert "outside of communication" in found["reason"]
    assert found["ranks"]["0"]["collective"] is None
    assert "inject.py" in found["ranks"]["0"]["stack"][0]
    ends = train(folder, "stuck", 2, [])
    assert {end.exit_code for end in ends} == {0}, ends[0].output
    for found_row, expected in zip(curve(folder / "stuck"), curve(folder / "whole"), strict=True):
        assert found_row == pytest.approx(expected, rel=1e-5)
    assert not (folder / "stuck" / "heartbeats").exists()


def hold_the_lock() -> None:
    """After the first step the training thread of rank 1 makes a call that keeps the interpreter."""
    import ctypes
    import importlib
    import os

    loop: Any = importlib.import_module("distllm.trainer.loop")
    take_step = loop.take_step

    def holding(job: Any, state: Any, allowed: Any) -> Any:
        if state.step == 1 and os.environ["RANK"] == "1":
            ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the lock during the call
        return take_step(job, state, allowed)

    loop.take_step = holding


@pytest.mark.long
def test_a_rank_that_holds_the_interpreter_is_named(folder: Path) -> None:
    """Its own watchdog cannot run: the others name it, and a deadline below the interpreter ends it."""
    with ForkedJob(folder, "train", *RUN, "run.dir=lock", num_ranks=2, sabotage=hold_the_lock) as job:
        ends = job.wait(90)
    assert {end.exit_code for end in ends} == {1}
    found = verdict(folder / "lock", step=1)
    assert found["suspects"] == [1]
    assert "Timeout" in ends[1].stderr
    assert "in holding" in ends[1].stderr


@pytest.mark.long
def test_a_slow_rank_is_named_while_the_job_goes_on(folder: Path) -> None:
    """300 ms more in each step of rank 2; from samples of where each rank is, without any message."""
    inject = ["sleep:rank=2,seconds=0.3,times=0"]
    ends = train(folder, "slow", 4, inject, "train.steps=50", "fault.hang_seconds=60")
    assert {end.exit_code for end in ends} == {0}, ends[0].output
    found = events(folder / "slow", "straggler")
    assert found, "nobody was named"
    assert {event["rank"] for event in found} == {2}
    assert all(event["busy_seconds"] > 0.3 for event in found)
    assert "rank 2 on " in ends[0].stderr
    assert status(folder / "slow")["state"] == "completed"


def slow_disk() -> None:
    """Saves that take longer than a hang may."""
    import importlib

    store: Any = importlib.import_module("distllm.checkpoint.store")
    write_shard = store._write_shard

    def slow(*arguments: Any) -> Any:
        time.sleep(7)
        return write_shard(*arguments)

    store._write_shard = slow


def test_a_slow_save_is_no_hang(folder: Path) -> None:
    """At once, and awaited at the end: fault.hang_seconds is 4, a save takes 7."""
    arguments = (*RUN, "run.dir=slow_save", "train.steps=5", "checkpoint.async_save=false")
    with ForkedJob(folder, "train", *arguments, sabotage=slow_disk) as job:
        (end,) = job.wait(90)
    assert end.exit_code == 0, end.output
    assert not list((folder / "slow_save").glob("hang_*"))

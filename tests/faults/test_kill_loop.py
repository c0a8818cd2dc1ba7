"""Thirty SIGKILLs at random times, many during saves: the run ends as if there had been none, to the bit."""

from __future__ import annotations

import importlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ForkedJob
from runs import SMALL_RUN, curve, read_rows, status, write_corpus

KILLS = 30
STEPS = 120
RUN = (
    *SMALL_RUN,
    "zero.stage=2",
    f"train.steps={STEPS}",
    "checkpoint.interval=2",
    "checkpoint.keep=2",
    "checkpoint.async_save=true",
)


def slow_disk() -> None:
    """Each shard takes 40 ms, as long as some steps: a kill at a random time often meets a save."""
    store: Any = importlib.import_module("distllm.checkpoint.store")
    write_shard = store._write_shard

    def slow(*arguments: Any) -> Any:
        result = write_shard(*arguments)
        time.sleep(0.04)
        return result

    store._write_shard = slow


def start(folder: Path, run: str) -> ForkedJob:
    return ForkedJob(folder, "train", *RUN, f"run.dir={run}", num_ranks=2, sabotage=slow_disk)


def finish(folder: Path, run: str) -> None:
    with start(folder, run) as job:
        for end in job.wait():
            assert end.exit_code == 0, end.output
    assert status(folder / run)["state"] == "completed"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    """2 ranks, 2 microbatches each, epochs of 119 sequences: kills meet accumulation and epoch ends."""
    write_corpus(tmp_path, num_documents=6)
    finish(tmp_path, "uninterrupted")
    run, generator = tmp_path / "killed", random.Random(20)
    kills_during_saves = kills = 0
    while kills < KILLS:
        with start(tmp_path, "killed") as job:
            begun = len(read_rows(run))
            while job.is_alive and len(read_rows(run)) in (0, begun):
                time.sleep(0.005)  # still starting, or dropping the rows after its checkpoint
            time.sleep(generator.uniform(0, 0.35))
            assert job.is_alive, "the run is too short for so many kills"
            job.kill()
        kills += 1
        kills_during_saves += any((run / "checkpoints").glob("*.tmp"))
    assert kills_during_saves >= 8, "too few kills met a save"
    finish(tmp_path, "killed")
    assert curve(run) == curve(tmp_path / "uninterrupted")
    assert [row[0] for row in curve(run)] == list(range(1, STEPS + 1))

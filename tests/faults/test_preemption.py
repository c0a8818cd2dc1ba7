"""Asked to stop: all ranks agree on a step, save, and say how it ended; the same command goes on."""

from __future__ import annotations

import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import ForkedJob, fork
from runs import SMALL_RUN, curve, events, read_rows, status, wait_for_steps, write_corpus

pytestmark = pytest.mark.alone  # a grace is a matter of seconds

STEPS = 60
RUN = (*SMALL_RUN, f"train.steps={STEPS}", "checkpoint.interval=1000", "zero.stage=1")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "pp2": (2, ("parallel.pipeline=2",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus and the uninterrupted run of each layout."""
    folder = tmp_path_factory.mktemp("preemption")
    write_corpus(folder)
    for layout, (num_ranks, settings) in LAYOUTS.items():
        with ForkedJob(folder, "train", *RUN, *settings, f"run.dir={layout}", num_ranks=num_ranks) as job:
            for end in job.wait():
                assert end.exit_code == 0, end.output
    return folder


@pytest.mark.parametrize(
    ("layout", "number", "is_agent"),
    [
        ("dp2", signal.SIGTERM, False),
        ("dp2", signal.SIGUSR1, True),
        pytest.param("pp2", signal.SIGTERM, True, marks=pytest.mark.long),
        pytest.param("pp2", signal.SIGUSR1, False, marks=pytest.mark.long),
        pytest.param("dp2", signal.SIGTERM, True, marks=pytest.mark.nightly),
        pytest.param("dp2", signal.SIGUSR1, False, marks=pytest.mark.nightly),
        pytest.param("pp2", signal.SIGTERM, False, marks=pytest.mark.nightly),
        pytest.param("pp2", signal.SIGUSR1, True, marks=pytest.mark.nightly),
    ],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    layout: str, number: signal.Signals, is_agent: bool, folder: Path
) -> None:
    """A last step that none has passed and all have done; no interval would have saved it."""
    run = f"{layout} {number.name} {is_agent}"
    num_ranks, settings = LAYOUTS[layout]
    arguments = (*RUN, *settings, f"run.dir={run}")
    environment = {"TORCHELASTIC_RUN_ID": "test", "DISTLLM_LAUNCHER": "torchrun.sh"} if is_agent else {}
    with ForkedJob(folder, "train", *arguments, num_ranks=num_ranks, environment=environment) as job:
        wait_for_steps(job, folder / run, 5)
        os.kill(job.processes[-1].pid or 0, number)
        ends = job.wait()
    # torchrun would restart ranks that end with 3.
    assert {end.exit_code for end in ends} == {0 if is_agent else 3}, ends[0].output
    done = len(read_rows(folder / run))
    assert 5 <= done < STEPS
    assert status(folder / run)["state"] == "preempted"
    assert status(folder / run)["step"] == done
    assert status(folder / run)["reason"] == f"asked to stop by {number.name} on rank 1"
    assert [path.name for path in (folder / run / "checkpoints").iterdir()] == [f"step_{done:08d}"]
    with ForkedJob(folder, "train", *arguments, num_ranks=num_ranks) as job:
        for end in job.wait():
            assert end.exit_code == 0, end.output
    assert curve(folder / run) == curve(folder / layout)
    assert status(folder / run)["state"] == "completed"


def test_a_signal_reaches_a_rank_that_waits_in_a_collective(folder: Path) -> None:
    """Rank 0 sleeps in step 3; rank 1, waiting for it in an all-reduce, is asked to stop meanwhile."""
    arguments = (*RUN, "run.dir=waiting", "fault.inject=['sleep:step=3,rank=0,seconds=3']")
    with ForkedJob(folder, "train", *arguments, num_ranks=2) as job:
        wait_for_steps(job, folder / "waiting", 3)
        time.sleep(1)
        os.kill(job.processes[1].pid or 0, signal.SIGTERM)
        ends = job.wait()
    assert {end.exit_code for end in ends} == {3}
    # The wish of step 4 had been asked for before the signal: step 5 is the last.
    assert 4 <= len(read_rows(folder / "waiting")) <= 6


def test_two_signals_are_one_wish(folder: Path) -> None:
    with ForkedJob(folder, "train", *RUN, "run.dir=twice", num_ranks=2) as job:
        wait_for_steps(job, folder / "twice", 3)
        for _ in range(3):
            for process in job.processes:
                os.kill(process.pid or 0, signal.SIGTERM)
        ends = job.wait()
    assert {end.exit_code for end in ends} == {3}
    assert [event["kind"] for event in events(folder / "twice")] == ["start", "ready", "checkpoint", "stop"]


def slow_disk() -> None:
    """A save that takes three seconds."""
    store: Any = importlib.import_module("distllm.checkpoint.store")
    write_shard = store._write_shard

    def slow(*arguments: Any) -> Any:
        time.sleep(3)
        return write_shard(*arguments)

    store._write_shard = slow


def test_a_grace_too_short_for_a_save_is_told_at_the_start(folder: Path) -> None:
    """Known from the run's last save; and by a probe of the disk where there is none."""
    settings = (*SMALL_RUN, "run.dir=grace", "checkpoint.interval=4", "fault.grace_seconds=2")
    first = fork(folder, "train", *settings, "train.steps=4", sabotage=slow_disk)
    assert first.exit_code == 0, first.output
    assert "a save is expected" not in first.output, "three megabytes are written at once"
    second = fork(folder, "train", *settings, "train.steps=5")
    assert "a save is expected to take 3." in second.stderr
    assert "fault.grace_seconds=2" in second.stderr

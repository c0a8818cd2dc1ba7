"""A rank that fails ends all ranks within seconds, and is named once; so does a stop that no step heeds."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ForkedJob
from runs import SMALL_RUN, events, status, wait_for_steps, write_corpus

pytestmark = pytest.mark.alone  # all ranks are gone within ten seconds

RUN = (*SMALL_RUN, "train.steps=8", "checkpoint.interval=2", "zero.stage=1", "train.micro_batch_size=1")
BROKEN_RANK, BROKEN_STEP = 1, 2
BROKEN_AT = Path("broken_at")
SECONDS = 10.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    write_corpus(folder)
    return folder


def break_down() -> None:
    """Raise, and leave the time behind: the start of the ranks is none of the test's time."""
    BROKEN_AT.write_text(str(time.time()))
    raise ValueError("an expected failure")


def break_in_step(inside: Callable[[Any], None]) -> None:
    """Call `inside(job)` on one rank when it begins one of its steps."""
    loop: Any = importlib.import_module("distllm.trainer.loop")
    take_step = loop.take_step

    def breaking(job: Any, state: Any, allowed: Any) -> Any:
        if state.step == BROKEN_STEP and os.environ.get("RANK") == str(BROKEN_RANK):
            inside(job)
        return take_step(job, state, allowed)

    loop.take_step = breaking


def break_forward() -> None:
    def inside(job: Any) -> None:
        job.engine.chunks[0].register_forward_pre_hook(lambda *_: break_down())

    break_in_step(inside)


def break_backward() -> None:
    def inside(job: Any) -> None:
        def break_gradient(*call: Any) -> None:
            call[-1].register_hook(lambda _: break_down())

        job.engine.chunks[0].register_forward_hook(break_gradient)

    break_in_step(inside)


def break_optimizer() -> None:
    def inside(job: Any) -> None:
        job.engine._optimizer_step = lambda *_: break_down()

    break_in_step(inside)


def break_save() -> None:
    checkpointing: Any = importlib.import_module("distllm.trainer.checkpointing")
    save = checkpointing.Checkpoints.save

    def breaking(self: Any, state: Any, reason: str) -> None:
        if os.environ["RANK"] == str(BROKEN_RANK):
            break_down()
        save(self, state, reason)

    checkpointing.Checkpoints.save = breaking


@pytest.mark.parametrize(
    "sabotage",
    [
        pytest.param(break_forward, marks=pytest.mark.long),
        break_backward,
        pytest.param(break_optimizer, marks=pytest.mark.long),
        break_save,
    ],
)
def test_a_rank_that_raises_ends_all_and_is_named_once(sabotage: Callable[[], None], folder: Path) -> None:
    run = sabotage.__name__
    (folder / BROKEN_AT).unlink(missing_ok=True)
    with ForkedJob(folder, "train", *RUN, f"run.dir={run}", num_ranks=4, sabotage=sabotage) as job:
        ends = job.wait(90)
    assert time.time() - float((folder / BROKEN_AT).read_text()) < SECONDS
    assert [end.exit_code for end in ends] == [1, 1, 1, 1], ends[BROKEN_RANK].output
    cause = f"rank {BROKEN_RANK} failed: ValueError: an expected failure"
    (stop,) = events(folder / run, "stop")
    assert stop["reason"] == status(folder / run)["reason"] == cause
    assert status(folder / run)["state"] == "failed"
    told = [line for end in ends for line in end.stderr.splitlines() if "ValueError: " in line]
    assert told == [f"distllm: {cause}; ending", "ValueError: an expected failure"]
    assert [end.stderr.count("Traceback") for end in ends] == [0, 1, 0, 0], "errors that follow are not shown"


def break_and_block() -> None:
    """Fail while all others sleep, as in a kernel that never ends; then let cleaning up never end either."""
    batches: Any = importlib.import_module("distllm.trainer.batches")
    batches.Batches.close = lambda self: time.sleep(1000)
    loop: Any = importlib.import_module("distllm.trainer.loop")

    def blocking(job: Any, state: Any, allowed: Any) -> Any:
        if os.environ["RANK"] == str(BROKEN_RANK):
            break_down()
        time.sleep(1000)

    loop.take_step = blocking


def test_ranks_that_cannot_notice_end_too(folder: Path) -> None:
    run = "blocked"
    (folder / BROKEN_AT).unlink(missing_ok=True)
    with ForkedJob(folder, "train", *RUN, f"run.dir={run}", num_ranks=2, sabotage=break_and_block) as job:
        ends = job.wait(90)
    assert time.time() - float((folder / BROKEN_AT).read_text()) < SECONDS
    assert [end.exit_code for end in ends] == [1, 1]
    assert "rank 1 failed: ValueError: an expected failure; ending" in ends[0].stderr
    assert ends[1].stderr.count("ValueError: an expected failure") == 1
    assert status(folder / run)["reason"] == "rank 1 failed: ValueError: an expected failure"


def test_a_stop_that_no_step_heeds_ends_all(folder: Path) -> None:
    """SIGTERM to rank 1, which waits for rank 0, which never comes: nothing can be saved."""
    settings = ("run.dir=stuck", "fault.inject=['hang:step=3,rank=0']", "fault.grace_seconds=4")
    with ForkedJob(folder, "train", *RUN, *settings, num_ranks=2) as job:
        wait_for_steps(job, folder / "stuck", 3)
        time.sleep(0.5)
        os.kill(job.processes[1].pid or 0, signal.SIGTERM)
        asked = time.monotonic()
        ends = job.wait(60)
        assert 4 < time.monotonic() - asked < 4 + SECONDS
    assert [end.exit_code for end in ends] == [3, 3], ends[1].output
    reason = "asked to stop by SIGTERM, but no step ended within 4 s"
    assert status(folder / "stuck")["reason"] == reason
    assert f"rank 1: {reason}; ending" in ends[1].stderr
    assert [event["reason"] for event in events(folder / "stuck", "stop")] == [reason]

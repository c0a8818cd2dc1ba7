"""64 ranks on one machine, with as few open files as many systems allow."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from commands import ForkedJob
from runs import SMALL_RUN, curve, read_rows, status, write_corpus

RANKS = 64
OPEN_FILES = 512
RUN = (
    *SMALL_RUN,
    "train.global_batch_size=64",
    "train.micro_batch_size=1",
    "optimizer.lr=0.001",
    "checkpoint.interval=2",
    "fault.hang_seconds=300",  # two cores take turns
)
FIRST = ("parallel.tensor=2", "parallel.pipeline=2", "zero.stage=1")
SECOND = ("parallel.tensor=2", "parallel.sequence=true", "zero.stage=3")


def limit_open_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


@pytest.mark.nightly
def test_64_ranks_start_save_and_go_on_under_another_layout(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    alone_in_steps = (*RUN, "run.dir=alone", "train.steps=4", "zero.stage=0")
    with ForkedJob(tmp_path, "train", *alone_in_steps, sabotage=limit_open_files) as job:
        (end,) = job.wait()
        assert end.exit_code == 0, end.output
    for layout, steps in ((FIRST, 2), (SECOND, 4)):
        arguments = (*RUN, *layout, "run.dir=many", f"train.steps={steps}", "schedule=constant")
        with ForkedJob(tmp_path, "train", *arguments, num_ranks=RANKS, sabotage=limit_open_files) as job:
            ends = job.wait(seconds=500)
        assert [end.exit_code for end in ends] == [0] * RANKS, ends[0].output
        assert status(tmp_path / "many")["state"] == "completed"
    # fp32 sums of 64 ranks in another order than one rank's.
    alone, many = curve(tmp_path / "alone"), curve(tmp_path / "many")
    assert [row["step"] for row in read_rows(tmp_path / "many") if "loss" in row] == [1, 2, 3, 4]
    for expected, found in zip(alone, many, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)

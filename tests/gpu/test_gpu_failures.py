"""A rank that dies or raises under NCCL, whose peers wait in kernels: all are gone within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from commands import ROOT, environment
from runs import SMALL_RUN, write_corpus

pytestmark = pytest.mark.gpu(2)
BOUND_SECONDS = 10
LAYOUTS = ("zero.stage=1", "zero.stage=3", "parallel.tensor=2", "parallel.pipeline=2")
MARK = "DISTLLM_TEST_MARK"


def marked(mark: str) -> list[int]:
    """Processes that were started with this mark in their environment, and live."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                is_ours = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                is_dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:  # it has ended meanwhile
                continue
            if is_ours and not is_dead:
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["kill", "error"])
def test_all_ranks_are_gone_soon(fault: str, layout: str, tmp_path: Path) -> None:
    """In step 20 of rank 1. Its time is that of the last row of metrics, since steps take milliseconds."""
    write_corpus(tmp_path)
    mark = uuid.uuid4().hex
    job = ("train.steps=1000000", "checkpoint.interval=0", "logging.interval=1", "run.dir=run", layout)
    command = [
        *(str(ROOT / "launch" / "torchrun.sh"), "--nproc-per-node", "2", "--max-restarts", "0"),
        *("-m", "distllm", "train", *SMALL_RUN, *job, f"fault.inject=['{fault}:step=20,rank=1']"),
    ]
    own = environment() | {MARK: mark, "PYTHON": sys.executable}
    with (tmp_path / "output").open("w") as output:
        agent = subprocess.Popen(command, cwd=tmp_path, env=own, stdout=output, stderr=output)
    try:
        agent.wait(240)
        while left := marked(mark):
            assert time.time() - struck(tmp_path) < 240, f"processes {left} are left"
            time.sleep(0.05)
        seconds = time.time() - struck(tmp_path)
    finally:
        for pid in marked(mark):
            os.kill(pid, 9)
        agent.wait()
    text = (tmp_path / "output").read_text()
    assert agent.returncode != 0, text
    assert seconds < BOUND_SECONDS, f"{seconds:.1f} s\n{text}"
    if fault == "error":
        assert "an injected error" in text


def struck(folder: Path) -> float:
    return (folder / "run" / "metrics.jsonl").stat().st_mtime

"""launch/torchrun.sh and launch/deepspeed.sh start what they are asked to, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from by_day import every_second
from commands import ROOT, Finished, environment, fork
from harness import free_port
from runs import SMALL_RUN, curve, read_rows, status, write_corpus

pytestmark = pytest.mark.alone  # launchers have deadlines

RUN = (*SMALL_RUN, "optimizer.lr=0.001", "train.steps=8", "checkpoint.interval=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus, the run `whole` of one process, and a hostfile."""
    folder = tmp_path_factory.mktemp("launchers")
    write_corpus(folder)
    (folder / "hostfile").write_text("localhost slots=2\n")
    whole = fork(folder, "train", *RUN, "run.dir=whole")
    assert whole.exit_code == 0, whole.output
    return folder


def launch(folder: Path, script: str, *arguments: str) -> Finished:
    result = subprocess.run(
        [ROOT / "launch" / script, *arguments],
        cwd=folder,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    return Finished(result.returncode, result.stdout, result.stderr)


def assert_trained(folder: Path, run: str) -> None:
    assert status(folder / run)["state"] == "completed"
    for found, expected in zip(curve(folder / run), curve(folder / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_torchrun_takes_arguments_as_they_are(folder: Path) -> None:
    """Also those with spaces."""
    overrides = (
        "run.dir=two words",
        "logging.sample_prompt='a prompt, with \"quotes\"'",
        "logging.sample_tokens=2",
    )
    result = launch(
        folder, "torchrun.sh", "--nproc-per-node", "2", "-m", "distllm", "train", *RUN, *overrides
    )
    assert result.exit_code == 0, result.output
    assert "plain torchrun" not in result.output
    assert_trained(folder, "two words")


# A program whose rank 1 dies in its first start; it meets rank 0 as distllm's ranks do.
DIES_ONCE = """
import os
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(1)
dist.barrier()
print("met again" if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" else "met", flush=True)
"""


def test_a_port_of_the_users_own_keeps_restarts(folder: Path) -> None:
    (folder / "dies_once.py").write_text(DIES_ONCE)
    place = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    result = launch(folder, "torchrun.sh", *place, "--max-restarts", "2", "dies_once.py")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("met again") == 2


def test_restarts_that_cannot_be_are_refused(folder: Path) -> None:
    place = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1"]
    result = launch(folder, "torchrun.sh", *place, "--max-restarts=3", "-m", "distllm", "train")
    assert result.exit_code == 2
    assert "fix:  --rdzv-backend=c10d --rdzv-endpoint=ADDRESS:PORT" in result.stderr


def hostfile_arguments(run: str, *overrides: str) -> list[str]:
    place = ["--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return ["hostfile", *place, "--module", "distllm", "train", *RUN, f"run.dir={run}", *overrides]


@pytest.mark.long
def test_deepspeed_starts_the_hosts_of_a_file(folder: Path) -> None:
    result = launch(folder, "deepspeed.sh", *hostfile_arguments("hosts", "zero.stage=2"))
    assert result.exit_code == 0, result.output
    assert_trained(folder, "hosts")


def processes_of(run: str) -> list[int]:
    """Those whose command line names the run directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={run}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it has just ended
    return found


def start_without_end(folder: Path, run: str) -> subprocess.Popen[bytes]:
    """A deepspeed job in its third step."""
    slow = "fault.inject=['sleep:seconds=0.1,times=0']"
    process = subprocess.Popen(
        [ROOT / "launch" / "deepspeed.sh", *hostfile_arguments(run, "train.steps=100000", slow)],
        cwd=folder,
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while len(read_rows(folder / run)) < 3:
        assert time.monotonic() < deadline, "no step within 90 s"
        assert process.poll() is None, "it ended before its third step"
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", every_second([signal.SIGTERM, signal.SIGUSR1]))
def test_a_signal_to_deepspeed_stops_the_ranks_with_a_checkpoint(
    number: signal.Signals, folder: Path
) -> None:
    run = f"signal {number.name}"
    process = start_without_end(folder, run)
    try:
        process.send_signal(number)
        process.wait(timeout=60)
        assert processes_of(run) == []
    finally:
        for pid in [process.pid, *processes_of(run)]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
    assert status(folder / run)["state"] == "preempted"
    assert (folder / run / "checkpoints" / f"step_{status(folder / run)['step']:08d}").is_dir()

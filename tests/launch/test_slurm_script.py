"""What launch/slurm.sbatch makes of every end of its ranks, on a real SLURM, with ranks that only pretend."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT
from slurm import Cluster

pytestmark = pytest.mark.long

# Stands in for `python -m distllm ENDS...`, an argument for each start of the job: its ranks' exit code;
# `preempted+9` writes that status and has rank 1 die of signal 9; `signal` waits for one and then ends as the
# contract says, with exit code 3.
PRETENDER = """
import json, os, signal, sys, time
if "--cfg" in sys.argv:
    print("dir: 'the run'")
    sys.exit()
end = sys.argv[1 + int(os.environ.get("SLURM_RESTART_COUNT", 0))]
rank = int(os.environ["RANK"])
world = ["WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
place = ["RANK", "LOCAL_RANK", "SLURMD_NODENAME", *world]
os.makedirs("the run", exist_ok=True)
def say(state):
    if rank == 0:
        with open("the run/status.json", "w") as file:
            json.dump({"state": state, "time": time.time()}, file)
if end == "signal":
    signals = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    print("ready", flush=True)
    signal.sigwait(signals)
    say("preempted")
    end = 3
elif end.startswith("preempted"):
    say("preempted")
    if rank == 1:
        os.kill(os.getpid(), int(end.partition("+")[2]))
    end = 3
print(json.dumps({name: os.environ[name] for name in place}), flush=True)
sys.exit(int(end))
"""


class Job:
    def __init__(self, cluster: Cluster, folder: Path, *ends: str) -> None:
        (folder / "distllm.py").write_text(PRETENDER)
        self.cluster = cluster
        self.folder = folder
        self.output = folder / "job.out"
        flags = (
            "--parsable",
            "--nodes=2",
            "--ntasks-per-node=2",
            f"--chdir={folder}",
            f"--output={self.output}",
        )
        self.number = cluster.command("sbatch", *flags, ROOT / "launch" / "slurm.sbatch", *ends)

    def wait_until_ranks_are_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not self.output.exists() or self.output.read_text().count("ready") < 4:
            assert time.monotonic() < deadline, self.cluster.logs()
            time.sleep(0.1)

    def end(self) -> tuple[str, str, int, int]:
        """State, exit code, restarts and counted failures, once all is over."""
        found = self.cluster.wait_for_end(self.number)
        failures = self.folder / "the run" / "slurm_failures.txt"
        count = len(failures.read_text().splitlines()) if failures.exists() else 0
        return found["JobState"], found["ExitCode"].partition(":")[0], int(found["Restarts"]), count


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.environment |= {"PYTHON": sys.executable, "PYTHONPATH": "", "DISTLLM_MAX_REQUEUES": "1"}
        yield cluster


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        pytest.param(["0"], ("COMPLETED", "0", 0, 0), id="done"),
        pytest.param(["2"], ("FAILED", "2", 0, 0), id="the user's mistake"),
        pytest.param(["1", "0"], ("COMPLETED", "0", 1, 1), id="a failure"),
        pytest.param(["1", "75"], ("FAILED", "75", 1, 2), id="more failures than allowed"),
        pytest.param(
            ["3", "3", "1", "0"], ("COMPLETED", "0", 3, 1), id="pre-emptions do not count as failures"
        ),
        pytest.param(["preempted+9", "0"], ("COMPLETED", "0", 1, 0), id="a rank killed after the save"),
        pytest.param(["3", "1", "1"], ("FAILED", "1", 2, 2), id="the status of an earlier start is stale"),
    ],
)
def test_every_end(
    ends: list[str], expected: tuple[str, str, int, int], cluster: Cluster, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, *ends)
    assert job.end() == expected, job.output.read_text()


def test_ranks_know_their_place(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "0")
    job.end()
    lines = [line for line in job.output.read_text().splitlines() if line.startswith("{")]
    ranks = sorted((json.loads(line) for line in lines), key=lambda rank: int(rank["RANK"]))
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["SLURMD_NODENAME"]) for rank in ranks] == [
        ("0", "0", "n1"),
        ("1", "1", "n1"),
        ("2", "0", "n2"),
        ("3", "1", "n2"),
    ]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"]) for rank in ranks} == {("4", "2")}
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_the_script_reaches_the_ranks(name: str, cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "signal", "0")
    job.wait_until_ranks_are_ready()
    cluster.command("scancel", f"--signal={name}", "--batch", job.number)
    assert job.end() == ("COMPLETED", "0", 1, 0), job.output.read_text()


def test_the_warning_before_the_time_limit_requeues(cluster: Cluster, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "signal", "0")
    job.wait_until_ranks_are_ready()
    cluster.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    assert job.end() == ("COMPLETED", "0", 1, 0), job.output.read_text()


@pytest.mark.parametrize(("command", "state"), [("scancel", "CANCELLED"), ("scontrol requeue", "COMPLETED")])
def test_what_slurm_has_decided_stands(command: str, state: str, cluster: Cluster, tmp_path: Path) -> None:
    """The ranks save in both cases: a job that was cancelled stays so, and none is requeued twice."""
    job = Job(cluster, tmp_path, "signal", "0")
    job.wait_until_ranks_are_ready()
    cluster.command(*command.split(), job.number)
    found, _, restarts, failures = job.end()
    assert (found, restarts, failures) == (state, int(state == "COMPLETED"), 0), job.output.read_text()


def test_too_few_processors_are_the_users_mistake(cluster: Cluster, tmp_path: Path) -> None:
    cluster.environment["SLURM_GPUS_ON_NODE"] = "8"
    try:
        job = Job(cluster, tmp_path, "0")
    finally:
        del cluster.environment["SLURM_GPUS_ON_NODE"]
    assert job.end() == ("FAILED", "2", 0, 0)
    assert "sbatch --ntasks-per-node=8" in job.output.read_text()

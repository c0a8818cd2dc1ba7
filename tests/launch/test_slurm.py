"""launch/slurm.sbatch trains on a real SLURM of two nodes: whatever ends a job, the run is completed as if
nothing had. What the script makes of every end is in test_slurm_script.py, with ranks that only pretend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, environment, start
from slurm import NODES, Cluster
from test_train import Workplace, curve, events, status

pytestmark = [pytest.mark.long, pytest.mark.alone]  # alone: SLURM has deadlines

SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEPS = 160
INTERVAL = 40  # of checkpoints
MIDDLE = 55  # of the run: behind a checkpoint, with some seconds to go
JOB = [
    f"train.steps={STEPS}",
    f"checkpoint.interval={INTERVAL}",
    "train.validation_interval=0",
    "logging.sample_tokens=0",
]


class Site(Workplace):
    """A workplace with a cluster."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        super().__init__(folder)
        self.cluster = cluster

    def submit(self, run: str, *overrides: str, options: tuple[str, ...] = ()) -> str:
        """The number of the job, which writes `run`.out."""
        settings = self.settings(run, *JOB, *overrides)
        flags = ("--parsable", "--nodes=2", f"--chdir={self.folder}", f"--output={self.folder / run}.out")
        return self.cluster.command("sbatch", *flags, *options, SCRIPT, "train", *settings)

    def log(self, run: str) -> str:
        return (self.folder / f"{run}.out").read_text()

    def failures(self, run: str) -> int:
        """Of those that the script counts."""
        file = self.folder / run / "slurm_failures.txt"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def starts(self, run: str) -> list[int]:
        """The step that each start of the run went on from."""
        return [event["step"] for event in events(self.folder / run) if event["kind"] == "start"]

    def wait_for_step(self, run: str, step: int) -> None:
        metrics = self.folder / run / "metrics.jsonl"

        def arrived() -> bool:
            return metrics.exists() and metrics.read_bytes().count(b'"loss"') >= step

        self.cluster.wait(arrived, 120, f"step {step}")
        if step > INTERVAL:  # it is saved in the background
            saved = self.folder / run / "checkpoints" / f"step_{INTERVAL:08d}" / "manifest.json"
            self.cluster.wait(saved.exists, 60, f"checkpoint of step {INTERVAL}")

    def assert_completed(self, run: str, job: dict[str, str], *, restarts: int) -> None:
        """After this many restarts: each step once, with the losses of the run that nothing interrupted."""
        path = self.folder / run
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(restarts)), self.log(run)
        assert status(path)["state"] == "completed"
        assert len(self.starts(run)) == restarts + 1
        for found, expected in zip(curve(path), curve(self.folder / "reference"), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)

    def assert_signal_was_heeded(self, run: str, step: int) -> None:
        """Which came after this step: the run went on from there, and nothing failed."""
        _, *resumed = self.starts(run)
        assert self.failures(run) == 0, self.log(run)
        assert min(resumed) >= step


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.environment |= environment() | {"PYTHON": sys.executable}
        site = Site(tmp_path_factory.mktemp("site"), cluster)
        reference = start(site.folder, "train", *site.settings("reference", *JOB), num_ranks=2)
        assert reference.exit_code == 0, reference.output
        yield site


def test_a_job_trains_on_two_nodes(site: Site) -> None:
    job = site.submit("plain")
    site.wait_for_step("plain", 1)
    tasks = site.cluster.command("scontrol", "--oneliner", "show", "step", f"{job}.0")
    assert "Nodes=2 CPUs=2 Tasks=2 " in tasks
    site.assert_completed("plain", site.cluster.wait_for_end(job), restarts=0)


@pytest.mark.nightly  # by day test_a_job_saves_and_goes_on_when_told_to requeues it
def test_a_requeued_job_goes_on(site: Site) -> None:
    job = site.submit("requeued")
    site.wait_for_step("requeued", MIDDLE)
    site.cluster.command("scontrol", "requeue", job)
    site.assert_completed("requeued", site.cluster.wait_for_end(job), restarts=1)
    assert site.starts("requeued")[1] >= INTERVAL


@pytest.mark.parametrize("node", [NODES[0], pytest.param(NODES[1], marks=pytest.mark.nightly)])
def test_a_job_survives_the_loss_of_a_node(site: Site, node: str) -> None:
    """n1 runs the script and rank 0, n2 only rank 1."""
    job = site.submit(node)
    site.wait_for_step(node, MIDDLE)
    site.cluster.kill_node(node)
    try:
        site.cluster.wait_for_node(node, "down")
    finally:
        site.cluster.start_node(node)
    site.assert_completed(node, site.cluster.wait_for_end(job), restarts=1)
    assert site.starts(node)[1] == INTERVAL


def test_a_job_saves_and_goes_on_when_told_to(site: Site) -> None:
    job = site.submit("signalled")
    site.wait_for_step("signalled", MIDDLE)
    site.cluster.command("scancel", "--signal=USR1", "--batch", job)
    site.assert_completed("signalled", site.cluster.wait_for_end(job), restarts=1)
    site.assert_signal_was_heeded("signalled", MIDDLE)


@pytest.mark.nightly  # SLURM looks at its limits every 30 s; test_slurm_script.py has the signal
def test_a_job_goes_on_after_its_time_limit(site: Site) -> None:
    # SLURM looks at the limits every 30 s: a job of 80 s at least is running then, however fast the machine.
    job = site.submit("limited", "fault.inject=['sleep:seconds=0.5,times=0']")
    site.wait_for_step("limited", 5)
    site.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    site.cluster.wait(lambda: site.cluster.job(job)["Restarts"] == "1", 120, "requeue")
    site.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    site.assert_completed("limited", site.cluster.wait_for_end(job), restarts=1)
    site.assert_signal_was_heeded("limited", 5)


def test_the_users_mistake_ends_the_job(site: Site) -> None:
    """One that only the ranks can find."""
    job = site.cluster.wait_for_end(site.submit("mistaken", "parallel.tensor=3"))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "1. world size=2" in site.log("mistaken")

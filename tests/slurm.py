"""A real SLURM cluster on this machine: munged, slurmctld and two slurmd, in one folder, on free ports.

    with Cluster(folder) as cluster:          # n1 and n2 are idle
        job = cluster.sbatch("launch/slurm.sbatch", "train", ...)
        cluster.wait_for_end(job)

Needs root and Debian's packages, which it installs where they are missing. Nothing else outside the folder
is written, and no process outlives the `with`, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from harness import free_port

NODES = ("n1", "n2")
SBIN = "/usr/sbin:" + os.environ["PATH"]
# Unlike a production cluster: two nodes share a host, and every waiting time is as short as it goes.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdTimeout=6
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE
"""


class Cluster:
    """See above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.config)}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        install()
        (self.folder / "state").mkdir()
        ports = {name: free_port() for name in ("slurmctld", *NODES)}
        self.config.write_text(CONFIG.format(host=socket.gethostname(), folder=self.folder, **ports))
        try:
            self._start_munged()
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            for node in NODES:
                self.wait_for_node(node, "idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Job steps outlive the daemons, so all is found by the environment that it has from us."""
        deadline = time.monotonic() + 10
        while left := self._processes():
            assert time.monotonic() < deadline, f"processes that cannot be killed: {left}"
            _kill(left)
            for daemon in self.daemons.values():
                daemon.wait()
            time.sleep(0.05)

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As when its power is cut: slurmd, the managers of its job steps and the ranks are gone at once."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        ours = self._processes()
        ranks = [pid for pid in ours if f"SLURMD_NODENAME={node}".encode() in _environment(pid)]
        managers = {_parent(pid) for pid in ranks} & set(ours) - set(ranks)
        assert managers, f"no job runs on {node}"
        # A manager first: it would still report the ends of its ranks.
        _kill([*managers, *ranks])

    def command(self, *command: str | Path) -> str:
        """The output of one of SLURM's commands."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def wait_for_node(self, node: str, state: str) -> None:
        def arrived() -> bool:  # a star marks a node that does not answer
            return self.command("sinfo", "--noheader", f"--nodes={node}", "--format=%t").rstrip("*") == state

        self.wait(arrived, 60, f"node {node} that is {state}")

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ..."""
        pairs = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    def wait_for_end(self, job: str, seconds: float = 180) -> dict[str, str]:
        """The job when it has ended for good; the two minutes between a requeue and the start are cut."""
        deadline = time.monotonic() + seconds
        hurried = "0"
        while True:
            found = self.job(job)
            if found["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"):
                return found
            if found["Reason"] == "BeginTime" and found["Restarts"] != hurried:
                # Not at once: what was issued in the second of the requeue is revoked with it.
                self.command("scontrol", "update", f"JobId={job}", "StartTime=now+2")
                hurried = found["Restarts"]
            assert time.monotonic() < deadline, f"{found}{self.logs()}"
            time.sleep(0.2)

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        socket_file = self.folder / "munge.socket"
        options = [f"--key-file={key}", f"--socket={socket_file}", *files]
        self._start("munged", "munged", "--foreground", "--force", *options)
        self.wait(socket_file.exists, 10, "munged")

    def _start(self, name: str, program: str, *arguments: str) -> None:
        found = shutil.which(program, path=SBIN)
        assert found, f"{program} is in none of {SBIN}"
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [found, *arguments], env=self.environment, stdout=output, stderr=output
            )

    def _processes(self) -> list[int]:
        mark = f"SLURM_CONF={self.config}".encode()
        return [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in _environment(pid)
        ]


def install() -> None:
    if shutil.which("slurmctld", path=SBIN) and shutil.which("munged", path=SBIN):
        return
    quiet = os.environ | {
        "DEBIAN_FRONTEND": "noninteractive",
        "RUNLEVEL": "1",
    }  # starts no service of the system
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
        subprocess.run(["apt-get", "-qq", *command], env=quiet, check=True, stdout=subprocess.DEVNULL)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile
        return []


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

"""What launch/slurm.sbatch asks of srun for processors, GPUs, limits and containers; srun only pretends here.

What becomes of the ranks' ends is tested on a real SLURM, in test_slurm_script.py.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

# Notes what it is asked for, then runs the command as one task, with the program that a container would have.
SRUN = """
import json, os, sys
options = [word for word in sys.argv[1:sys.argv.index("bash")]]
with open("srun.jsonl", "a") as file:
    file.write(json.dumps(options) + "\\n")
os.environ.update(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_NTASKS="8")
os.execvp("bash", sys.argv[sys.argv.index("bash"):])
"""
DISTLLM = """
import json, os, resource, sys
if "--cfg" in sys.argv:
    sys.exit(print("dir: 'the run'") if "wrong" not in sys.argv else 2)
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_PORT"]
limits = [resource.getrlimit(limit) for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)]
place = {name: os.environ[name] for name in names}
print(json.dumps({"place": place, "limits": limits, "arguments": sys.argv[1:]}))
"""
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "64"}


@dataclass
class Started:
    exit_code: int
    asked: list[list[str]]
    rank: dict[str, Any]
    errors: str


def start(folder: Path, *arguments: str, **settings: str) -> Started:
    """The script in an allocation of two nodes; SLURM's variables are `settings`."""
    for name, text in {"srun": SRUN, "distllm.py": DISTLLM}.items():
        file = folder / name
        file.write_text(f"#!{sys.executable}\n{text}" if name == "srun" else text)
        file.chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": ""}
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        ["bash", ROOT / "launch" / "slurm.sbatch", *arguments],
        cwd=folder,
        env=kept | own | ALLOCATION | settings,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lower_soft_limits,
    )
    log = folder / "srun.jsonl"
    asked = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rank = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    return Started(result.returncode, asked, rank, result.stderr)


def lower_soft_limits() -> None:
    for limit, soft in ((resource.RLIMIT_NOFILE, 256), (resource.RLIMIT_MEMLOCK, 65536)):
        resource.setrlimit(limit, (soft, resource.getrlimit(limit)[1]))


@pytest.mark.parametrize(
    ("settings", "tasks", "per_node", "cpus"),
    [
        pytest.param({"SLURM_GPUS_ON_NODE": "8"}, 16, 8, 8, id="a share of what the job has"),
        pytest.param({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 16, 8, 3, id="as asked for"),
        pytest.param({"SLURM_NTASKS_PER_NODE": "4"}, 8, 4, 16, id="without GPUs"),
        pytest.param(
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "64(x1),16"}, 16, 8, 2, id="unequal nodes"
        ),
        pytest.param(
            {"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "h100:1"}, 16, 8, 8, id="a GPU for each task"
        ),
    ],
)
def test_ranks_and_their_processors(
    settings: dict[str, str], tasks: int, per_node: int, cpus: int, tmp_path: Path
) -> None:
    started = start(tmp_path, "train", "run.dir=the run", **settings)
    assert started.exit_code == 0, started.errors
    (options,) = started.asked
    assert {f"--ntasks={tasks}", f"--ntasks-per-node={per_node}", f"--cpus-per-task={cpus}"} <= set(options)
    assert not [option for option in options if "container" in option]
    assert started.rank["place"] | {"MASTER_PORT": ""} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": str(per_node),
        "OMP_NUM_THREADS": str(cpus),
        "MASTER_PORT": "",
    }
    assert started.rank["place"]["MASTER_PORT"].isdigit()
    assert started.rank["arguments"] == ["train", "run.dir=the run"]
    assert all(soft == hard for soft, hard in started.rank["limits"]), "files and locked memory"


def test_the_container_is_passed_through(tmp_path: Path) -> None:
    image = {"DISTLLM_IMAGE": "nvcr.io#some/image:1", "DISTLLM_MOUNTS": "/data:/data:ro"}
    started = start(tmp_path, "train", SLURM_GPUS_ON_NODE="8", OMP_NUM_THREADS="4", **image)
    assert started.exit_code == 0, started.errors
    question, ranks = started.asked
    for options in (question, ranks):
        assert "--container-image=nvcr.io#some/image:1" in options
        assert f"--container-workdir={tmp_path}" in options
        assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data:ro" in options
    assert {"--relative=0", "--ntasks=1"} <= set(question), "where rank 0 will be"
    assert started.rank["place"]["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "4"}, "8 ranks per node need as many processors"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_TASK": "2"}, "one rank runs on one GPU, not on 2"),
    ],
)
def test_what_cannot_be_started_is_the_users_mistake(
    settings: dict[str, str], told: str, tmp_path: Path
) -> None:
    started = start(tmp_path, "train", **settings)
    assert (started.exit_code, started.asked) == (2, [])
    assert told in started.errors


@pytest.mark.parametrize("image", ["", "an.sqsh"])
def test_a_mistake_in_the_command_starts_no_rank(image: str, tmp_path: Path) -> None:
    started = start(tmp_path, "train", "wrong", DISTLLM_IMAGE=image)
    assert started.exit_code == 2
    assert len(started.asked) == bool(image)
    assert started.rank == {}

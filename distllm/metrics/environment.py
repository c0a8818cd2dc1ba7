"""The environment of a run: enough to repeat it, without secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import distllm

PACKAGES = ("torch", "deepspeed", "megatron-core", "datasets", "tokenizers", "hydra-core")

# Variables that determine ranks, threads, devices and communication. An allow list, since the environment
# also holds secrets.
RELEVANT = re.compile(
    r"(WORLD_SIZE|RANK|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|MASTER_ADDR|MASTER_PORT"
    r"|OMP_NUM_THREADS|MKL_NUM_THREADS|CUDA_VISIBLE_DEVICES|CUDA_DEVICE_MAX_CONNECTIONS|PYTORCH_\w*ALLOC_CONF"
    r"|(SLURM|NCCL|TORCH_NCCL|GLOO|TORCHELASTIC)_\w+)"
)
# SLURM_JWT, for one, lets its bearer act as the user.
SECRET = re.compile(r"JWT|TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY($|_)")


def describe_environment() -> dict[str, object]:
    """Return versions, machine, commit and command line of this process; imports nothing heavy."""
    return {
        "versions": package_versions(),
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _processor_model(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "git_commit": git_commit(Path(distllm.__file__).resolve().parents[1]),
        "command_line": sys.orig_argv,
        "working_directory": os.getcwd(),
        "environment_variables": relevant_variables(os.environ),
    }


def package_versions() -> dict[str, str | None]:
    """Return versions of distllm, Python and its dependencies; None for those that are not installed."""
    versions: dict[str, str | None] = {"distllm": distllm.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables by which a launcher or user controls a distributed job, sorted; never a secret."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if RELEVANT.fullmatch(name) and not SECRET.search(name)
    }


def git_commit(checkout: Path) -> str | None:
    """Return the commit of `checkout`, with `-dirty` after local changes; None unless it is the top of one.

    Lying inside a checkout is not enough: a virtual environment often lies inside some other project.
    """
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()

"""Detect the process that started this rank, and act on it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def is_under_agent() -> bool:
    """Return whether torchrun's agent watches this rank.

    The agent restarts all ranks when one ends with another code than 0, and hides the code from its caller.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_plain_torchrun() -> bool:
    """Return whether torchrun was started without launch/torchrun.sh, which its restarts need."""
    return is_under_agent() and "DISTLLM_LAUNCHER" not in os.environ


def die_with_launcher() -> None:
    """Let the kernel kill this rank when its agent dies.

    Else it lives on as an orphan, holds its port, its GPU and the run directory, and waits for peers that are
    gone.
    """
    if is_under_agent():
        _die_with_parent()
        if os.getppid() == 1:
            os.kill(os.getpid(), signal.SIGKILL)  # the agent died before the call


def die_with(parent: int) -> None:
    """Let the kernel kill this process when `parent`, the process that started it, ends, however it ends.

    It is also killed when the thread of `parent` that started it ends earlier.
    """
    _die_with_parent()
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def seconds_since_start() -> float:
    """Return the age of this process; Linux counts its start in ticks since boot."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, uptime - started)

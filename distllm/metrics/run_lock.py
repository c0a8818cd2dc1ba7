"""One job per run directory: a second one would overwrite the first one's metrics and checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from distllm.config.problems import user_error

LOCK = ".lock"
WAIT_SECONDS = 5.0  # a job restarted by a scheduler or agent may start before the old one has ended


class RunLock:
    """A lock that rank 0 holds from before it reads the run directory until it ends, however it ends.

    A POSIX record lock: the kernel frees it with the process, and NFS and Lustre support it across machines.
    On a file system without locks the job runs unprotected, since nothing can be checked there.
    """

    def __init__(self, run_dir: Path, wait_seconds: float = WAIT_SECONDS) -> None:
        self._file: BinaryIO = open(run_dir / LOCK, "ab+")  # noqa: SIM115 - held until `release`
        deadline = time.monotonic() + wait_seconds
        while not self._try_lock():
            if time.monotonic() > deadline:
                self._file.seek(0)
                owner = self._file.read().decode(errors="replace").strip() or "unknown"
                self._file.close()
                raise user_error(
                    "run.dir",
                    run_dir,
                    f"another job is running in it: {owner}",
                    "wait for that job or stop it, or choose another run.dir",
                )
            time.sleep(0.2)
        self._file.truncate(0)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T %z")}
        self._file.write(json.dumps(content).encode())
        self._file.flush()

    def release(self) -> None:
        self._file.truncate(0)
        self._file.close()

    def _try_lock(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True  # no locks on this file system
        return True

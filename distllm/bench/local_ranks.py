"""Start ranks on this machine, on gloo, each a process that runs one function; with a deadline."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from distllm.runtime.launcher import die_with

LOG_TAIL_CHARACTERS = 3000


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    deadline_seconds: float = 600,
    starts_world: bool = True,
) -> list[Any]:
    """Run function(rank, *args) on every rank of a world started and stopped around it; results by rank.

    `function` is importable by name. starts_world: if false, `function` starts and stops it. RuntimeError
    with the logs of the ranks that fail or are not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="distllm-ranks-") as name:
        folder = Path(name)
        call = (function.__module__, function.__qualname__, args, starts_world)
        (folder / "call").write_bytes(pickle.dumps(call))
        processes = [_start(rank, world_size, folder) for rank in range(world_size)]
        try:
            _wait(processes, folder, time.monotonic() + deadline_seconds)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world_size)]


def _start(rank: int, world_size: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process per rank.

    The ranks meet at a port that rank 0 has found free, through a file: no port is free for sure until it is
    bound.
    """
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # to find `function` by name
    }
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(folder), str(os.getpid())],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(processes) if process.poll()]
    late = [rank for rank, process in enumerate(processes) if process.poll() is None]
    texts = [
        f"rank {rank} {'failed' if failed else 'is not done in time'}:\n"
        + (folder / f"log{rank}").read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
        for rank in failed or late
    ]
    if texts:
        raise RuntimeError("\n".join(texts))


def _main(folder: Path) -> None:
    from distllm.config.registry import load_plugins
    from distllm.runtime import dist, light_imports, quiet

    quiet.silence()
    light_imports.install()
    load_plugins()
    rank = int(os.environ["RANK"])
    os.environ.update(_rendezvous(rank, folder))
    module, name, args, starts_world = pickle.loads((folder / "call").read_bytes())
    function = getattr(importlib.import_module(module), name)
    if starts_world:
        runtime = dist.start(timedelta(seconds=300))
    result = function(rank, *args)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    if starts_world:
        dist.stop(runtime, succeeded=True)


def _rendezvous(rank: int, folder: Path) -> dict[str, str]:
    file = folder / "port"
    if rank == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        written = folder / "port.written"
        written.write_text(port)
        written.rename(file)
    while not file.exists():
        time.sleep(0.01)
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": file.read_text()}


if __name__ == "__main__":
    die_with(int(sys.argv[2]))  # else ranks outlive a killed program and occupy its cores
    try:
        _main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a group that waits for others would keep the process

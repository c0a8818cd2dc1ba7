"""Run a function on several gloo ranks, forked from one warmed process, with a deadline for hangs.

    results = run_ranks(4, function, case)     # function(rank, case) on ranks 0..3, in a started world
    results = run_ranks(2, function, case, on_gpus=True)    # NCCL, each rank a new process with a GPU

The warm process imports torch, Megatron Core and DeepSpeed once per test session; a start of four ranks then
costs a fraction of a second. A rank that raises, dies or hangs fails the test with that rank's log, and no
rank outlives the call.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LOG_TAIL_CHARACTERS = 6000


class RanksFailedError(AssertionError):
    """Some rank raised, died or hung; the message holds its log."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    deadline_seconds: float = 120,
    on_gpus: bool = False,
) -> list[Any]:
    """function(rank, *args) on every rank of a started world; returns their results by rank.

    `function` must be importable by name (module level). The world is started and stopped around it.
    """
    # The warm process has told DeepSpeed that there are no GPUs, which those forked from it would inherit.
    context: Any = multiprocessing.get_context("spawn" if on_gpus else "forkserver")
    if not on_gpus:
        context.set_forkserver_preload(["warm"])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
        port = free_port()
        processes: list[BaseProcess] = []
        receivers: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, world_size, port, str(logs[rank]), sender, function, args),
                    daemon=True,
                )
                process.start()
                sender.close()
                processes.append(process)
                receivers.append(receiver)
            return _collect(processes, receivers, logs, deadline_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _collect(
    processes: list[BaseProcess],
    receivers: list[Connection],
    logs: list[Path],
    deadline_seconds: float,
) -> list[Any]:
    deadline = time.monotonic() + deadline_seconds
    results: dict[int, Any] = {}
    waiting = set(range(len(processes)))
    while waiting:
        ready = multiprocessing.connection.wait(
            [receivers[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic())
        )
        if not ready:
            raise RanksFailedError(
                f"ranks {sorted(waiting)} hung for {deadline_seconds:.0f} s" + _tails(logs, waiting)
            )
        for rank in [rank for rank in waiting if receivers[rank] in ready]:
            waiting.remove(rank)
            try:
                succeeded, value = pickle.loads(receivers[rank].recv_bytes())
            except EOFError:
                processes[rank].join(5)
                value, succeeded = f"died with exit code {processes[rank].exitcode}", False
            if not succeeded:
                raise RanksFailedError(f"rank {rank}: {value}" + _tails(logs, {rank}))
            results[rank] = value
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.exitcode != 0:
            raise RanksFailedError(
                f"a rank ended with exit code {process.exitcode}" + _tails(logs, range(len(logs)))
            )
    return [results[rank] for rank in range(len(processes))]


def _tails(logs: list[Path], ranks: Any) -> str:
    parts = []
    for rank in sorted(ranks):
        text = logs[rank].read_text(errors="replace") if logs[rank].exists() else ""
        parts.append(f"\n----- log of rank {rank} -----\n{text[-LOG_TAIL_CHARACTERS:]}")
    return "".join(parts)


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    log: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_DEVICE_MAX_CONNECTIONS="1",  # for tensor parallelism on GPUs, see distllm/runtime/dist.py
    )
    import faulthandler
    import gc
    from datetime import timedelta

    import torch

    from distllm.runtime import dist

    faulthandler.enable()
    gc.freeze()  # what the warm process has imported is no garbage: `jobs.finish` collects in milliseconds
    torch.set_num_threads(1)  # ranks share two cores; more threads than cores only wait for each other
    try:
        runtime = dist.start(timedelta(seconds=60))
        value = function(rank, *args)
        dist.stop(runtime, succeeded=True)
    except BaseException as error:
        traceback.print_exc()
        sender.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}")))
        sys.stderr.flush()
        os._exit(1)
    # Not send(): multiprocessing would pass tensors by a handle that dies with this process.
    sender.send_bytes(pickle.dumps((True, value)))
    sender.close()

"""Start and stop the distributed runtime: device, backend, world group.

Single process, `torchrun`, `deepspeed` and `srun` use the same code; only the source of rank and rendezvous
differs.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from distllm.config.problems import UserError, user_error
from distllm.layout.tree import BRANCHES, WORLD, Tree
from distllm.runtime import cpu, ending, half_products
from distllm.runtime.allocator import keep_freed_memory, let_segments_grow
from distllm.runtime.devices import RANKS_IN_MESSAGES, device_index, refuse_shared_devices
from distllm.runtime.launcher import die_with_launcher

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """The place of this process in the world. everyone: exchanges small objects with all other ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: timedelta
    everyone: Tree

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which prints messages and owns the run directory."""
        return self.rank == 0

    def peak_memory_bytes(self) -> int | None:
        """Return the most device memory allocated so far; None without a GPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def is_main() -> bool:
    """Return whether this process is rank 0, also before the world exists."""
    return int(os.environ.get("RANK", 0)) == 0


def start(timeout: timedelta, tensor_parallel: int = 1) -> Runtime:
    """Choose the device and create the world group: NCCL on GPUs, gloo without."""
    if tensor_parallel > 1:
        # Kernels then start in the order in which they are called. Megatron Core's linear layers (0.16.1,
        # tensor_parallel/layers.py) rely on it: their communication starts before the matrix product that
        # overlaps it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    die_with_launcher()
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed requires the variable
    device = _choose_device(local_rank)
    raise_file_limit()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # for the watchdog's report on NCCL
        # gloo then only carries small objects through trees: connect what talks, not each with all others.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # Without `device_id`: with it every group that is made later splits the communicator of all ranks, which
    # takes all of them (torch 2.13, distributed_c10d.py), and messages between stages wait for other work of
    # their group.
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        # A store in memory: a single process needs no port, so any number of them run side by side.
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    everyone = _everyone(backend, world_size, timeout)
    if device.type == "cuda":
        refuse_shared_devices(device, everyone)
    return Runtime(rank, world_size, local_rank, device, timeout, everyone)


def _everyone(backend: str, world_size: int, timeout: timedelta) -> Tree:
    """Return the tree of all ranks: the world group itself where that holds objects in host memory."""
    if backend == "gloo" and world_size <= BRANCHES:
        return WORLD
    return Tree.create(range(world_size), timeout)


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one: sockets are files, and 1024 is a usual soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop(runtime: Runtime, succeeded: bool) -> None:
    """Leave the world group.

    After success all ranks meet first: a rank that leaves while a peer still sends aborts the peer. After a
    failure the peers may be gone or stuck, and so may this rank's device or, after a signal, its libraries'
    threads: the groups stay as they are, and `__main__` ends the process at once.
    """
    if not succeeded:
        ending.leave_groups()
        return
    runtime.everyone.meet()
    dist.destroy_process_group()


def on_main_rank(everyone: Tree, function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result on every rank; all ranks raise its user errors.

    A rank that fails alone leaves the others waiting for it.
    """
    outcome: T | UserError | None = None
    if dist.get_rank() == 0:
        try:
            outcome = function()
        except UserError as error:
            outcome = error
    outcome = everyone.broadcast(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome  # type: ignore[return-value]


def assert_equal_on_all_ranks(everyone: Tree, what: str, value: str) -> None:
    """Check that `value` is equal on all ranks: else a hang or a wrong model would follow later."""
    own: dict[str, tuple[int, ...]] = {value: (dist.get_rank(),)}
    held = everyone.agree(own, _ranks_by_value)
    first, *others = held.items()
    if others:
        different = sorted(rank for _, ranks in others for rank in ranks)
        raise user_error(
            what,
            f"{first[0]} on rank {first[1][0]}, {others[0][0]} on rank {others[0][1][0]}",
            f"the {what} must be equal on every rank; ranks {different} differ from rank 0",
            "start every rank with the same command line and the same conf/",
        )


def _ranks_by_value(
    a: dict[str, tuple[int, ...]], b: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Add up which ranks hold which value: a few of each, for a message."""
    return {value: (a.get(value, ()) + b.get(value, ()))[:RANKS_IN_MESSAGES] for value in a | b}


def _choose_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed searches for accelerators and logs it
        cpu.install()
        half_products.install()
        keep_freed_memory()
        return torch.device("cpu")
    let_segments_grow()
    ranks_on_node = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    index = device_index(local_rank, ranks_on_node, torch.cuda.device_count())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)

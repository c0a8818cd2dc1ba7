"""Which GPU is a rank's own, and the peak speed of devices by name, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from distllm.config.problems import user_error
from distllm.layout.tree import Tree

RANKS_IN_MESSAGES = 8

# Dense bf16 FLOP/s with fp32 accumulation, from NVIDIA's datasheets; the first name that matches counts.
PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the peak FLOP/s of one device; None where no figure is known: then there is no MFU."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    return next((peak for known, peak in PEAK_BF16_FLOPS.items() if known in name), None)


def device_index(local_rank: int, ranks_on_node: int, num_visible: int) -> int:
    """Return the number of a rank's GPU among those it sees. User error: they are too few.

    A launcher may show each rank nothing but its own GPU (SLURM's --gpus-per-task=1). One GPU that all ranks
    of a node see looks the same from here; `refuse_shared_devices` tells them apart once ranks can talk.
    """
    if num_visible == 1:
        return 0
    if ranks_on_node > num_visible:
        raise user_error(
            "ranks per node",
            ranks_on_node,
            f"one rank per GPU, and this node has {num_visible}",
            f"start at most {num_visible} ranks on this node",
        )
    return local_rank


def refuse_shared_devices(device: torch.device, everyone: Tree) -> None:
    """Refuse, on all ranks, a job that has several ranks on one GPU. Collective.

    Each rank counts the visits to its GPU on the rendezvous store, one operation of one rank, so that nothing
    grows with the world.
    """
    store = dist.distributed_c10d._get_default_store()
    visitor = store.add(f"GPU {torch.cuda.get_device_properties(device).uuid}", 1)
    refuse_late_visitors(visitor, dist.get_rank(), everyone)


def refuse_late_visitors(visitor: int, rank: int, everyone: Tree) -> None:
    """Raise the user error on all ranks if any is not the first visitor, 1, of its GPU. Collective."""
    late = everyone.agree([rank] if visitor > 1 else [], lambda a, b: (a + b)[:RANKS_IN_MESSAGES])
    if late:
        raise user_error(
            "ranks per node",
            f"ranks {late} share a GPU with an earlier rank",
            "one rank per GPU",
            "start as many ranks on a node as it has GPUs",
        )


def warning_of_precision(device: torch.device, precision: str) -> str | None:
    """Return what to tell who trains in fp32 on a GPU, where this is seldom meant."""
    if device.type != "cuda" or precision != "fp32":
        return None
    return (
        "fp32 on GPUs uses neither their tensor cores nor FlashAttention, and activations take twice the "
        "memory: set train.precision=bf16 unless fp32 is meant"
    )

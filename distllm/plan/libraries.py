"""Device memory of the libraries beneath PyTorch's allocator: estimates, none of them measured by us. Pure.

All of it is 0 where `cluster.device` is no GPU.
"""

from __future__ import annotations

from distllm.config.schema import Config
from distllm.layout.grid import Grid
from distllm.plan.rank_view import RankView

MIB = 2**20
# An estimate: what `nvidia-smi` shows after one tensor was put on a GPU, 1343 MiB, in Hugging Face's
# documentation (transformers, "model memory anatomy"). Context and kernels; less where kernels load lazily.
CONTEXT_BYTES = 1343 * MIB
# An estimate: PyTorch's default for Hopper (aten/src/ATen/cuda/CUDABlas.cpp and CublasHandlePool.cpp:
# 4096 KiB x 8; 8 MiB elsewhere), once for cuBLAS and once for cuBLASLt.
CUBLAS_BYTES = 2 * 32 * MIB
# NCCL's buffers of one channel towards one peer, by protocol (src/init.cc, `computeBuffSizes`): LL 8 lines x
# 512 threads x 8 steps x 16 bytes, LL128 120 elements x 640 threads x 8 steps x 8 bytes, Simple 4 MiB.
NCCL_CHANNEL_BYTES = 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + 4 * MIB
# Estimates: the number of channels depends on node and group. 24 is what NCCL's log tells of 8 H100 behind
# NVSwitch, where it may be up to 32; messages between two stages use fewer.
NCCL_CHANNELS, NCCL_CHANNELS_BETWEEN_TWO = 24, 4
NCCL_RING_PEERS = 2  # the rank before and the rank after


def is_gpu(config: Config) -> bool:
    return config.cluster.device not in (None, "cpu")


def context_bytes(config: Config) -> int:
    """Return bytes of the CUDA context and cuBLAS's workspaces: an estimate."""
    return CONTEXT_BYTES + CUBLAS_BYTES if is_gpu(config) else 0


def communicator_bytes(view: RankView) -> int:
    """Return bytes of NCCL's buffers in all communicators of a rank: an estimate."""
    if not is_gpu(view.config):
        return 0
    ring = NCCL_CHANNELS * NCCL_RING_PEERS * NCCL_CHANNEL_BYTES
    pair = NCCL_CHANNELS_BETWEEN_TWO * NCCL_CHANNEL_BYTES
    return num_communicators(view) * ring + num_neighbours(view) * pair


def num_communicators(view: RankView) -> int:
    """Return the number of communicators for collectives: one for each group of several ranks that is used.

    NCCL makes a communicator at the first message of a group (layout/groups.py, runtime/dist.py).
    """
    sizes = view.grid.group_sizes
    groups = {"data", "tensor", "pipeline", "model"} & sizes.keys()
    is_end = view.stage.is_first or view.stage.is_last
    embedding = is_end and view.config.model.tie_embeddings and view.grid.pipeline > 1
    return sum(sizes[group] > 1 for group in groups) + embedding + (view.grid.world_size > 1)


def num_neighbours(view: RankView) -> int:
    """Return the stages that this one exchanges activations with: PyTorch makes a communicator for each.

    `ProcessGroupNCCL` has one for each pair of ranks that send one message at a time.
    """
    grid: Grid = view.grid
    if grid.pipeline == 1:
        return 0
    is_ring = len(view.stage.chunks) > 1  # the last stage's chunks send to the first stage's
    is_inner = not (view.stage.is_first or view.stage.is_last)
    return min(2, grid.pipeline - 1) if is_ring or is_inner else 1

"""Process groups for checkpoints alone: a write in the background must not meet training's messages."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from distllm.layout.grid import Grid


@dataclass(frozen=True)
class SaveGroups:
    """world: all ranks. stage: the ranks of this rank's pipeline stage. None is the default world group."""

    world: ProcessGroup | None = None
    stage: ProcessGroup | None = None


def create_save_groups(grid: Grid, timeout: timedelta) -> SaveGroups:
    """Collective. gloo, since what is exchanged are small objects in host memory.

    timeout: within which the slowest rank must have written its part after the fastest.
    """
    world = dist.new_group(backend="gloo", timeout=timeout)
    stages = [
        dist.new_group(ranks.reshape(-1).tolist(), backend="gloo", timeout=timeout) for ranks in grid.ranks
    ]
    return SaveGroups(world, stages[grid.coordinates(dist.get_rank()).pipeline])

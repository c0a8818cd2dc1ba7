"""Process groups for checkpoints alone: messages of a background write must not mix with training's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from distllm.config.axes import AXES
from distllm.layout.grid import Grid


@dataclass(frozen=True)
class SaveGroups:
    """world: all ranks. stage: the ranks of this rank's pipeline stage. None is the default world group."""

    world: ProcessGroup | None = None
    stage: ProcessGroup | None = None


def create_save_groups(grid: Grid, timeout: timedelta) -> SaveGroups:
    """Create the groups. Collective. gloo, since small objects in host memory are exchanged.

    timeout: within which the slowest rank must have written its part after the fastest.
    """
    world = dist.new_group(backend="gloo", timeout=timeout)
    # One row per stage: ranks that differ on any other axis.
    rows = grid.groups(*(axis for axis in AXES if axis != "pipeline"))
    stages = [dist.new_group(row.tolist(), backend="gloo", timeout=timeout) for row in rows]
    return SaveGroups(world, stages[grid.coordinates(dist.get_rank()).pipeline])

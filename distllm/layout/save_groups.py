"""Process groups for checkpoints alone: messages of a background write must not mix with training's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from distllm.config.axes import AXES
from distllm.layout.grid import Grid
from distllm.layout.tree import WORLD, Tree


@dataclass(frozen=True)
class SaveGroups:
    """world: all ranks, stage by stage. stage: the ranks of this rank's pipeline stage."""

    world: Tree = WORLD
    stage: Tree = WORLD


def create_save_groups(grid: Grid, timeout: timedelta) -> SaveGroups:
    """Create the groups. Collective.

    timeout: within which the slowest rank must have written its part after the fastest.
    """
    # One row per stage: ranks that differ on any other axis.
    rows = grid.groups(*(axis for axis in AXES if axis != "pipeline")).tolist()
    stage = Tree.create(rows[grid.coordinates(dist.get_rank()).pipeline], timeout)
    stages = Tree.create([row[0] for row in rows], timeout)
    return SaveGroups(Tree(stage.groups + stages.groups), stage)

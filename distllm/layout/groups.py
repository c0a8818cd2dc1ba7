"""Process groups from the grid, created once, and passed to the code that needs them.

Code that trains, reads data or saves asks for a role: what the ranks of a group do together. Only code that
handles an axis itself (pipeline schedules, tensor-parallel layers) asks for the group of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from distllm.layout.grid import Coordinates, Grid
from distllm.layout.local_group import new_local_group
from distllm.layout.megatron_state import forget, hand_over
from distllm.layout.place import Place


@dataclass(frozen=True)
class Role:
    """The ranks that do something together. rank: the number of this one among them."""

    group: ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Groups:
    """This rank's process groups by axis; below, its roles.

    data: same part of the model.
    tensor: same layers, other part of each.
    pipeline: other layers.
    model: all ranks of one copy of the model.
    embedding: first and last stage of a pipeline, None elsewhere.
    num_chunks: model chunks on this rank.
    megatron: the same groups in Megatron Core's form.
    made: all of them, each once.
    """

    grid: Grid
    coordinates: Coordinates
    data: ProcessGroup
    tensor: ProcessGroup
    pipeline: ProcessGroup
    model: ProcessGroup
    embedding: ProcessGroup | None
    num_chunks: int
    megatron: ProcessGroupCollection
    made: tuple[ProcessGroup, ...] = ()

    @property
    def by_name(self) -> dict[str, ProcessGroup]:
        """All groups that this rank is in but the world."""
        groups = {"model": self.model, "data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        return groups | ({"embedding": self.embedding} if self.embedding is not None else {})

    @property
    def samples(self) -> Role:
        """Return the ranks that each read different samples."""
        return Role(self.data, self.coordinates.data, self.grid.data)

    @property
    def loss(self) -> Role:
        """Return the ranks over whose losses the mean is taken: each has other tokens of the global batch."""
        return self.samples

    def gradient(self, place: Place) -> Role:
        """Return the ranks that hold the same part of a parameter.

        Its gradient is reduced over them, ZeRO partitions it over them, and one of them writes it to a
        checkpoint.
        """
        return self.samples

    @property
    def norm(self) -> ProcessGroup:
        """Return the ranks with other elements of the model: a norm's square is summed over them."""
        return self.model

    @property
    def is_traced(self) -> bool:
        """Return whether this rank is traced, for those that do the same on other parts or samples."""
        return self.coordinates.data == 0 and self.coordinates.tensor == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pipeline == self.grid.pipeline - 1

    def is_first_chunk(self, chunk: int) -> bool:
        """Return whether model chunk `chunk` of this rank starts the model and holds the embedding."""
        return self.coordinates.pipeline == 0 and chunk == 0

    def is_last_chunk(self, chunk: int) -> bool:
        """Return whether model chunk `chunk` of this rank ends the model and holds the output projection."""
        return self.is_last_stage and chunk == self.num_chunks - 1


def create_groups(grid: Grid, timeout: timedelta, num_chunks: int = 1) -> Groups:
    """Create this rank's process groups; called once, on all ranks, after the world group exists.

    num_chunks: model chunks on each rank. Axes of degree 1 share one group of this rank alone.
    """
    rank = dist.get_rank()

    def group(*axes: str) -> ProcessGroup:
        row = grid.group_of(rank, *axes)
        made = new_local_group(row, timeout) if len(row) > 1 else alone
        assert made is not None, f"rank {rank} is not in its own group {row}"
        return made

    alone = new_local_group([rank], timeout)
    assert alone is not None, f"rank {rank} is not in its own group"
    data, tensor, pipeline = group("data"), group("tensor"), group("pipeline")
    model = group("pipeline", "tensor")
    ends = grid.group_of(rank, "pipeline")[:: max(1, grid.pipeline - 1)]
    embedding = new_local_group(ends, timeout) if grid.pipeline > 1 else alone
    return Groups(
        grid=grid,
        coordinates=grid.coordinates(rank),
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        model=model,
        embedding=embedding,
        num_chunks=num_chunks,
        megatron=hand_over(
            data=data, tensor=tensor, pipeline=pipeline, model=model, context=alone, num_chunks=num_chunks
        ),
        made=tuple(dict.fromkeys(g for g in (alone, data, tensor, pipeline, model, embedding) if g)),
    )


def destroy_groups() -> None:
    """Forget the groups, in a process that is about to end."""
    forget()


def release_groups(groups: Groups) -> None:
    """Destroy the groups, in a process that will make others. Collective: ranks meet first, since one that
    leaves while a peer still sends aborts the peer.

    Groups that are only forgotten keep their sockets and threads, on gloo some ten of each per group, until
    the process ends: after a few dozen grids threads do little but wake each other.
    """
    dist.barrier()
    forget()
    for group in groups.made:
        dist.destroy_process_group(group)

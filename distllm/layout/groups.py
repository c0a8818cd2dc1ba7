"""Process groups from the grid, created once, by Megatron Core, and passed to the code that needs them.

Code that trains, reads data or saves asks for a role: what the ranks of a group do together. Only code that
handles an axis itself (pipeline schedules, tensor-parallel layers) asks for the group of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup, distributed_c10d

from distllm.config.axes import AXES
from distllm.layout.grid import Coordinates, Grid
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
    made: all that were made for this grid, also those that nothing here uses.
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
    """Create the process groups of `grid`; called once, on all ranks, after the world group exists.

    Megatron Core 0.16.1 reads some groups from its module state even where it takes them as arguments
    (`parallel_state` in schedules and checkpointing), so it has to make them. An assertion compares them with
    the grid's slices, since a difference in rank order would train a wrong model without any error.
    """
    before = _registered_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
        create_gloo_process_groups=False,
    )
    megatron = ProcessGroupCollection.use_mpu_process_groups()
    groups = Groups(
        grid=grid,
        coordinates=grid.coordinates(dist.get_rank()),
        data=parallel_state.get_data_parallel_group(),
        tensor=megatron.tp,
        pipeline=megatron.pp,
        model=megatron.mp,
        embedding=megatron.embd if parallel_state.is_rank_in_embedding_group() else None,
        num_chunks=num_chunks,
        megatron=megatron,
        made=tuple(group for group in _registered_groups() if group not in before),
    )
    _assert_slices(groups)
    return groups


def destroy_groups() -> None:
    """Forget the groups, so that a process may make others."""
    parallel_state.destroy_model_parallel()


def release_groups(groups: Groups) -> None:
    """Destroy the groups, in a process that will make others. Collective: ranks meet first, since one that
    leaves while a peer still sends aborts the peer.

    Groups that are only forgotten keep their sockets and threads, on gloo some ten of each per group, until
    the process ends: after a few dozen grids threads do little but wake each other.
    """
    dist.barrier()
    destroy_groups()
    for group in groups.made:
        dist.destroy_process_group(group)


def _registered_groups() -> list[ProcessGroup]:
    """Return all groups that this rank is in, as torch (2.11 to 2.13) keeps them: it has no public list."""
    return list(distributed_c10d._world.pg_map)


def _assert_slices(groups: Groups) -> None:
    grid, rank = groups.grid, dist.get_rank()
    slices = {axis: grid.groups(axis) for axis in AXES} | {"model": grid.groups("pipeline", "tensor")}
    for name, rows in slices.items():
        expected = next(row.tolist() for row in rows if rank in row)
        actual = dist.get_process_group_ranks(groups.by_name[name])
        assert actual == expected, f"{name} group of rank {rank} is {actual}, the grid says {expected}"

"""Process groups from the grid. Made once, by Megatron Core, and handed to whoever needs them.

Who trains, reads data or saves asks for a role: what the ranks of a group do together. Only who handles an
axis itself (pipeline schedules, tensor-parallel layers) asks for the group of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

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

    data: same part of the model. tensor: same layers, other part of each. pipeline: other layers.
    model: all ranks of one copy of the model. embedding: first and last stage of a pipeline, None elsewhere.
    num_chunks: model chunks on this rank. megatron: the same groups in Megatron Core's form.
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

    @property
    def by_name(self) -> dict[str, ProcessGroup]:
        """All groups that this rank is in but the world."""
        groups = {"model": self.model, "data": self.data, "tensor": self.tensor, "pipeline": self.pipeline}
        return groups | ({"embedding": self.embedding} if self.embedding is not None else {})

    @property
    def samples(self) -> Role:
        """The ranks of which each reads other samples."""
        return Role(self.data, self.coordinates.data, self.grid.data)

    @property
    def loss(self) -> Role:
        """The ranks over whose losses the mean is taken: each has other tokens of the global batch."""
        return self.samples

    def gradient(self, place: Place) -> Role:
        """The ranks that hold the same part of a parameter: over them its gradient is reduced, among them
        ZeRO partitions it, and one of them writes it to a checkpoint."""
        return self.samples

    @property
    def norm(self) -> ProcessGroup:
        """The ranks whose gradients are other elements of the model: over them a norm's square is summed."""
        return self.model

    @property
    def is_traced(self) -> bool:
        """Whether this rank speaks for those that do the same on other parts or other samples."""
        return self.coordinates.data == 0 and self.coordinates.tensor == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pipeline == self.grid.pipeline - 1

    def is_first_chunk(self, chunk: int) -> bool:
        """Whether model chunk `chunk` of this rank starts the model: it holds the embedding."""
        return self.coordinates.pipeline == 0 and chunk == 0

    def is_last_chunk(self, chunk: int) -> bool:
        """Whether model chunk `chunk` of this rank ends the model: it holds the output projection."""
        return self.is_last_stage and chunk == self.num_chunks - 1


def create_groups(grid: Grid, timeout: timedelta, num_chunks: int = 1) -> Groups:
    """Make the process groups of `grid`; called once, on all ranks, after the world group exists.

    Megatron Core 0.16.1 reads some groups from its module state even where it takes them as arguments
    (`parallel_state` in schedules and checkpointing), so it has to make them; that they are the grid's
    slices is asserted, since a difference in rank order would train a wrong model without any error.
    """
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
    )
    _assert_slices(groups)
    return groups


def destroy_groups() -> None:
    """Forget the groups, so that a process may make others."""
    parallel_state.destroy_model_parallel()


def _assert_slices(groups: Groups) -> None:
    grid, rank = groups.grid, dist.get_rank()
    slices = {axis: grid.groups(axis) for axis in AXES} | {"model": grid.groups("pipeline", "tensor")}
    for name, rows in slices.items():
        expected = next(row.tolist() for row in rows if rank in row)
        actual = dist.get_process_group_ranks(groups.by_name[name])
        assert actual == expected, f"{name} group of rank {rank} is {actual}, the grid says {expected}"

"""The rank grid: which rank does what. Pure arithmetic, no process group, no torch.

Ranks are one array with the axes [pipeline, data, tensor], tensor fastest: neighbours in number share a
layer, because they talk most and sit on one node. Every process group is a slice of that array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]


class Coordinates(NamedTuple):
    """Place of one rank on each axis of the grid."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Grid:
    """Degrees of parallelism; `world_size` is their product."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        assert min(self.data, self.tensor, self.pipeline) >= 1, f"degrees must be at least 1: {self!r}"

    @classmethod
    def from_world_size(cls, world_size: int, *, tensor: int = 1, pipeline: int = 1) -> Grid:
        """Data parallelism is what tensor and pipeline parallelism leave of the world."""
        assert world_size % (tensor * pipeline) == 0, (
            f"world size {world_size} is no multiple of tensor {tensor} x pipeline {pipeline}"
        )
        return cls(data=world_size // (tensor * pipeline), tensor=tensor, pipeline=pipeline)

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline

    @cached_property
    def ranks(self) -> Ranks:
        """All ranks, [pipeline, data, tensor]."""
        return np.arange(self.world_size).reshape(self.pipeline, self.data, self.tensor)

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, f"rank {rank} is not in a world of {self.world_size}"
        return Coordinates(*(int(i) for i in np.unravel_index(rank, self.ranks.shape)))

    def rank(self, coordinates: Coordinates) -> int:
        return int(self.ranks[coordinates])

    # Each of these is one group per row: [groups, ranks of the group].

    @property
    def tensor_groups(self) -> Ranks:
        """Ranks that share a layer."""
        return self.ranks.reshape(-1, self.tensor)

    @property
    def data_groups(self) -> Ranks:
        """Ranks that hold the same part of the model."""
        return np.moveaxis(self.ranks, 1, -1).reshape(-1, self.data)

    @property
    def pipeline_groups(self) -> Ranks:
        """Ranks that pass activations to each other, first stage first."""
        return np.moveaxis(self.ranks, 0, -1).reshape(-1, self.pipeline)

    @property
    def model_groups(self) -> Ranks:
        """Ranks that together hold one copy of the model."""
        return np.moveaxis(self.ranks, 1, 0).reshape(self.data, -1)

    def __str__(self) -> str:
        """The grid drawn, one row per data-parallel replica and one column per stage; long axes are cut."""
        width = len(str(self.world_size - 1))
        columns = _shortened(self.pipeline, most=3)
        header = [""] + ["..." if stage is None else f"stage {stage}" for stage in columns]
        table = [header]
        for replica in _shortened(self.data, most=4):
            row = ["..." if replica is None else f"replica {replica}"]
            for stage in columns:
                cell = "..." if None in (stage, replica) else self._draw_cell(stage or 0, replica or 0, width)
                row.append(cell)
            table.append(row)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in table)
        return "\n".join(line.rstrip() for line in lines)

    def _draw_cell(self, stage: int, replica: int, width: int) -> str:
        ranks: Iterable[str] = (
            "..." if i is None else f"{self.ranks[stage, replica, i]:>{width}}"
            for i in _shortened(self.tensor, most=4)
        )
        return "[" + " ".join(ranks) + "]"


def _shortened(size: int, most: int) -> list[int | None]:
    """range(size), its middle replaced by None where it is longer than `most`."""
    if size <= most:
        return list(range(size))
    return [*range(most - 1), None, size - 1]

"""The rank grid: the coordinates of every rank. Pure arithmetic, no process group, no torch.

Ranks are one array whose axes are AXES, the last one fastest. Every process group is a slice of that array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distllm.config.axes import AXES, REST, degrees
from distllm.config.schema import Parallel

Ranks = NDArray[np.int64]


class Coordinates(NamedTuple):
    """Place of one rank on each axis of the grid, in the order of AXES."""

    pipeline: int
    data: int
    tensor: int

    def of(self, axis: str) -> int:
        return self[AXES.index(axis)]


@dataclass(frozen=True)
class Grid:
    """Degrees of parallelism; `world_size` is their product."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        assert min(self.degrees.values()) >= 1, f"degrees must be at least 1: {self!r}"

    @classmethod
    def of(cls, parallel: Parallel, world_size: int) -> Grid:
        """Return the grid of these settings; the rest of the world size is data parallelism."""
        found = degrees(parallel, world_size)
        assert found is not None, f"world size {world_size} is no multiple of {parallel}"
        return cls(**found)

    @property
    def degrees(self) -> dict[str, int]:
        """Return the degrees by axis, in the order of AXES."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def described(self) -> dict[str, int]:
        """The same in the order in which they are described: data parallelism first, then inside out."""
        return {axis: self.degrees[axis] for axis in (REST, *(axis for axis in AXES[::-1] if axis != REST))}

    @property
    def group_sizes(self) -> dict[str, int]:
        """Ranks of each process group, by the names of `Groups.by_name`."""
        return {
            "world": self.world_size,
            "model": self.world_size // self.data,
            "embedding": min(self.pipeline, 2),
            **self.degrees,
        }

    @property
    def world_size(self) -> int:
        return math.prod(self.degrees.values())

    @cached_property
    def ranks(self) -> Ranks:
        """Return all ranks, an array with a dim for each of AXES."""
        return np.arange(self.world_size).reshape(*self.degrees.values())

    def coordinates(self, rank: int) -> Coordinates:
        assert 0 <= rank < self.world_size, f"rank {rank} is not in a world of {self.world_size}"
        return Coordinates(*(int(i) for i in np.unravel_index(rank, self.ranks.shape)))

    def rank(self, coordinates: Coordinates) -> int:
        return int(self.ranks[coordinates])

    def groups(self, *axes: str) -> Ranks:
        """Return [groups, ranks of the group]: ranks that differ on these axes only, in rising order."""
        kept = [AXES.index(axis) for axis in AXES if axis in axes]
        size = math.prod(self.ranks.shape[dim] for dim in kept)
        return np.moveaxis(self.ranks, kept, range(-len(kept), 0)).reshape(-1, size)

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """Return the ranks that differ from `rank` on these axes only, in rising order."""
        at = self.coordinates(rank)
        row = tuple(slice(None) if axis in axes else at.of(axis) for axis in AXES)
        ranks: list[int] = self.ranks[row].reshape(-1).tolist()
        return ranks

    def __str__(self) -> str:
        """Draw the grid, one row per data-parallel replica and one column per stage; long axes are cut."""
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
    """Return range(size), its middle replaced by None where it is longer than `most`."""
    if size <= most:
        return list(range(size))
    return [*range(most - 1), None, size - 1]

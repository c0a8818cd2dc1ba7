"""The parameters that a rank holds before ZeRO partitions anything: names, shapes, optimizer groups. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distllm.layout.place import Shape
from distllm.model.parameters import Table
from distllm.optimizers import Recipe

Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Held:
    """The parameters that a rank holds.

    shapes: by canonical name, as modules have them, in the model's order, in which ZeRO partitions them.
    group_of: the optimizer's group of each.
    num_groups: groups without a parameter included.
    """

    shapes: Shapes
    group_of: Mapping[str, int]
    num_groups: int

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def numel_by_group(self) -> list[list[int]]:
        """Return the elements of each parameter, in order, for each group."""
        groups: list[list[int]] = [[] for _ in range(self.num_groups)]
        for name, shape in self.shapes.items():
            groups[self.group_of[name]].append(math.prod(shape))
        return groups


def held_parameters(table: Table, degrees: Mapping[str, int], recipe: Recipe) -> Held:
    """Return a rank's parts of the parameters of `table`. degrees: of parallelism, by axis."""
    shapes = {name: entry.module_shape(degrees) for name, entry in table.items()}
    group_of = {name: recipe.group_of(entry.is_decayed) for name, entry in table.items()}
    return Held(shapes, group_of, recipe.num_groups)

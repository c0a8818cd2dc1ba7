"""The place of a rank's piece of a parameter in the whole parameter. Pure geometry.

A parameter has a canonical name and a global shape that no layout changes. A rank holds a box of it (its
tensor-parallel part), and under ZeRO a flat range of that box. A flat range of a row-major array is at most 2
* dimensions - 1 boxes, so every layout can describe its parts as boxes, which every other layout can read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A contiguous run of elements that is also a box of the global tensor."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Place:
    """This rank's part of one parameter.

    name: canonical, with the global layer number.
    global_shape: of the whole parameter; gated projections are seen as [2, ffn, hidden], so that tensor
        parallelism cuts one dim.
    local_shape, offsets: this rank's box.
    primary: whether this rank is the one that counts, among ranks with the same box and other model-parallel
        coordinates: it writes the checkpoint and enters the gradient norm.
    is_decayed: whether weight decay applies.
    """

    name: str
    global_shape: Shape
    local_shape: Shape
    offsets: Shape
    primary: bool
    is_decayed: bool = True

    @property
    def numel(self) -> int:
        """Return the number of elements of this rank's box, also where ZeRO holds the parameter in parts."""
        return math.prod(self.local_shape)

    def boxes(self, start: int, stop: int) -> list[Box]:
        """Return the boxes of the global tensor that flat elements [start, stop) cover, in flat order."""
        assert 0 <= start <= stop <= math.prod(self.local_shape), (
            f"{self.name}: [{start}, {stop}) is outside of {self.local_shape}"
        )
        return [
            Box(tuple(a + b for a, b in zip(box.offsets, self.offsets, strict=True)), box.sizes)
            for box in flat_range_boxes(self.local_shape, start, stop)
        ]


def flat_range_boxes(shape: Shape, start: int, stop: int) -> list[Box]:
    """Return the flat elements [start, stop) of a row-major array as boxes, in flat order."""
    return list(_boxes(shape, start, stop)) if start < stop else []


def _boxes(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    if len(shape) == 0:
        yield Box((), ())
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row_numel = math.prod(shape[1:])
    first_row, head = divmod(start, row_numel)
    last_row, tail = divmod(stop, row_numel)
    if first_row == last_row:
        yield from _within_row(shape, first_row, head, tail)
        return
    if head:
        yield from _within_row(shape, first_row, head, row_numel)
        first_row += 1
    if first_row < last_row:
        yield Box((first_row, *(0 for _ in shape[1:])), (last_row - first_row, *shape[1:]))
    if tail:
        yield from _within_row(shape, last_row, 0, tail)


def _within_row(shape: Shape, row: int, start: int, stop: int) -> Iterator[Box]:
    for box in _boxes(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))


def module_of(name: str) -> str:
    """Return the module that a parameter is filed under: its layer, or the name without its last word.

    All its pieces lie on ranks of one pipeline stage.
    """
    layer = re.match(r".*\.layers\.\d+", name)
    return layer.group() if layer else name.rpartition(".")[0] or name

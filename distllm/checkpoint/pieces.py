"""The parts of the global tensors that a rank holds, cut into boxes.

A tensor's key is "<state>/<canonical name>", the state being "weight" or the optimizer's own name. Tensors
are filed by module, such as one transformer layer: a reader never needs the list of all pieces at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from distllm.layout.fragment import Fragment
from distllm.layout.place import Box, Shape

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor; view: its elements, live memory in the box's shape."""

    state: str
    name: str
    global_shape: Shape
    box: Box
    view: Tensor

    @property
    def key(self) -> str:
        return f"{self.state}/{self.name}"

    def cut(self, numel: int) -> tuple[Piece | None, list[Piece]]:
        """Return a first part of at most `numel` elements, in a box, and the rest in order.

        The part is None only where not even one element is wanted; the rest may hold more of them.
        """
        if self.box.numel <= numel:
            return self, []
        if numel == 0:
            return None, [self]
        dim = next(dim for dim, size in enumerate(self.box.sizes) if size > 1)
        num_rows = numel // (self.box.numel // self.box.sizes[dim])
        if num_rows > 0:
            return self._rows(dim, 0, num_rows), [self._rows(dim, num_rows, self.box.sizes[dim])]
        first, rest = self._rows(dim, 0, 1).cut(numel)
        return first, [*rest, self._rows(dim, 1, self.box.sizes[dim])]

    def _rows(self, dim: int, begin: int, end: int) -> Piece:
        offsets, sizes = list(self.box.offsets), list(self.box.sizes)
        offsets[dim], sizes[dim] = offsets[dim] + begin, end - begin
        view = self.view.narrow(dim, begin, end - begin)
        return replace(self, box=Box(tuple(offsets), tuple(sizes)), view=view)


def pieces_of(fragments: Iterable[Fragment]) -> list[Piece]:
    """Return all boxes of all tensors of the fragments."""
    pieces = []
    for fragment in fragments:
        place, boxes = fragment.place, fragment.place.boxes(fragment.start, fragment.stop)
        for state, flat in fragment.tensors.items():
            begin = 0
            for box in boxes:
                view = flat.narrow(0, begin, box.numel).view(box.sizes)
                pieces.append(Piece(state, place.name, place.global_shape, box, view))
                begin += box.numel
    return pieces

"""The parts of the global tensors that a rank holds, cut into boxes.

A tensor's key is "<state>/<canonical name>", the state being "weight" or the optimizer's own name. Tensors
are filed by module, such as one transformer layer: a reader never needs the list of all pieces at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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

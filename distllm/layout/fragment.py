"""What a rank holds of a parameter and its optimizer state: the common tongue of engine and checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distllm.layout.place import Place


@dataclass(frozen=True)
class Fragment:
    """The flat elements [start, stop) of this rank's part of one parameter.

    tensors: "weight" (fp32) and every state the optimizer keeps per element, whatever it calls them; each is
    a 1-D view of live memory with stop - start elements. writer: this rank writes it to a checkpoint; among
    replicas exactly one does.
    """

    place: Place
    start: int
    stop: int
    tensors: dict[str, Tensor]
    writer: bool

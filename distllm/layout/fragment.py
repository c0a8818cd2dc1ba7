"""A rank's part of a parameter and its optimizer state: the common interface of engine and checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distllm.layout.place import Place


@dataclass(frozen=True)
class Fragment:
    """The flat elements [start, stop) of this rank's part of one parameter.

    tensors: "weight" (fp32) and every state the optimizer keeps per element, by its own names; each is a 1-D
        view of live memory with stop - start elements.
    writer: whether this rank writes it to a checkpoint; exactly one of its replicas does.
    """

    place: Place
    start: int
    stop: int
    tensors: dict[str, Tensor]
    writer: bool

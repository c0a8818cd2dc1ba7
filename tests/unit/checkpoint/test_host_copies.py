"""The copies that a save in the background writes from."""

from __future__ import annotations

import torch
from torch import Tensor

from distllm.checkpoint.async_writer import _HostCopies
from distllm.checkpoint.pieces import Piece
from distllm.layout.place import Box


def piece(view: Tensor) -> Piece:
    return Piece("weight", "a.weight", (9, 9), Box((0, 0), tuple(view.shape)), view)


def test_the_memory_of_one_save_serves_the_next() -> None:
    """Fresh memory costs more time than the copy, and training waits for it."""
    flat = torch.rand(1000)
    pieces = [piece(flat[7:607].view(20, 30)), piece(flat.bfloat16()), piece(flat[:5])]
    copies = _HostCopies()
    first = copies.copy(pieces)
    flat += 1
    second = copies.copy(pieces)
    assert [p.view.data_ptr() for p in first] == [p.view.data_ptr() for p in second]
    assert all(torch.equal(copy.view, p.view) for copy, p in zip(second, pieces, strict=True))
    assert not {p.view.data_ptr() for p in second} & {p.view.data_ptr() for p in pieces}
    fewer = copies.copy(pieces[:1])
    assert fewer[0].view.data_ptr() == first[0].view.data_ptr()

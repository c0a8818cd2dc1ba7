"""A piece is written from where it lies, and as much of it as it is."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distllm.checkpoint.dcp import write_pieces
from distllm.checkpoint.pieces import Piece
from distllm.layout.place import Box


class Addresses(io.BytesIO):
    """Notes where in memory what is written comes from: {address: bytes}."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[int, int] = {}

    def write(self, data: Any) -> int:
        content = np.frombuffer(data, dtype=np.uint8)
        self.sources[content.ctypes.data] = content.nbytes
        return super().write(data)


def piece(view: Tensor) -> Piece:
    return Piece("weight", "a.weight", (9, 9), Box((0, 0), tuple(view.shape)), view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 7])
def test_a_part_of_a_flat_buffer_is_written_without_a_copy(begin: int, dtype: torch.dtype) -> None:
    """Copies would take longer than the writes, and as much memory as the largest piece."""
    flat = torch.rand(1000).to(dtype)
    view = flat[begin : begin + 600].view(20, 30)
    stream = Addresses()
    (record,) = write_pieces(stream, "shard", [piece(view)])
    assert stream.sources[view.data_ptr()] == view.nbytes
    assert record.length == stream.tell() < view.nbytes + 2000  # not the whole of the buffer
    stream.seek(0)
    assert torch.equal(torch.load(stream), view)


@pytest.mark.parametrize("view", [torch.rand(6, 8)[:, 2:5], torch.tensor(3.0), torch.rand(3, 4).t()])
def test_any_view_is_written_as_it_is_seen(view: Tensor) -> None:
    stream = io.BytesIO()
    write_pieces(stream, "shard", [piece(view)])
    stream.seek(0)
    assert torch.equal(torch.load(stream), view)

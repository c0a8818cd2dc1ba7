"""The copies that a save in the background writes from."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distllm.checkpoint.async_writer import LARGEST_BLOCK, SMALLEST_BLOCK, _HostCopies, pinned_blocks
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


def test_what_is_reserved_serves_the_first_save() -> None:
    pieces = [piece(torch.rand(20, 30)), piece(torch.rand(7).bfloat16())]
    copies = _HostCopies()
    copies.reserve(pieces)
    reserved = [block.data_ptr() for block in copies._blocks]
    (block,) = copies._blocks  # without a GPU one, of what is needed
    assert block.nbytes == 20 * 30 * 4 + 7 * 2 + 2 * 64
    copies.copy(pieces)
    assert [block.data_ptr() for block in copies._blocks] == reserved


@given(st.integers(1, 40 * LARGEST_BLOCK))
def test_pinned_blocks_waste_less_than_the_smallest(num_bytes: int) -> None:
    sizes = pinned_blocks(num_bytes)
    assert all(size.bit_count() == 1 for size in sizes), "PyTorch rounds others up"
    assert max(sizes) <= LARGEST_BLOCK
    assert min(sizes) >= SMALLEST_BLOCK
    assert num_bytes <= sum(sizes) < num_bytes + SMALLEST_BLOCK


def test_pinned_blocks_of_known_sizes() -> None:
    mib = 2**20
    assert pinned_blocks(5) == [mib]
    assert pinned_blocks(700 * mib) == [512 * mib, 128 * mib, 32 * mib, 16 * mib, 8 * mib, 4 * mib]
    assert pinned_blocks(2**31 + 1) == [2**30, 2**30, mib]


def test_pieces_are_cut_at_the_ends_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 1024 bytes, as on a GPU with 1 GiB: every element is there once, in a box."""

    def add_small_blocks(self: _HostCopies, num_bytes: int, pinned: bool) -> None:
        self._blocks += [torch.empty(1024, dtype=torch.uint8) for _ in range(-(-num_bytes // 1024))]

    monkeypatch.setattr(_HostCopies, "_add_blocks", add_small_blocks)
    copies = _HostCopies()
    pieces = [
        Piece("weight", "a", (2, 50, 30), Box((0, 10, 0), (2, 20, 30)), torch.rand(2, 20, 30)),
        Piece("weight", "b", (9, 900), Box((3, 100), (1, 700)), torch.rand(1, 700).bfloat16()),
        Piece("weight", "c", (5,), Box((0,), (5,)), torch.rand(5)),
    ]
    copies.reserve(pieces)
    blocks = [block.data_ptr() for block in copies._blocks]
    assert len(blocks) == 7, "no room is wasted: 6,220 bytes"
    parts = copies.copy(pieces)
    assert [block.data_ptr() for block in copies._blocks] == blocks
    ends = sorted((part.view.data_ptr(), part.view.data_ptr() + part.view.nbytes) for part in parts)
    assert all(any(a <= begin and end <= a + 1024 for a in blocks) for begin, end in ends)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
    for original in pieces:
        found = torch.full(original.global_shape, torch.nan, dtype=original.view.dtype)
        for part in (part for part in parts if part.name == original.name):
            assert part.view.shape == part.box.sizes
            found[index(part.box)] = part.view
        assert torch.equal(found[index(original.box)], original.view)
        assert int((~found.isnan()).sum()) == original.box.numel
    assert sum(part.box.numel for part in parts) == sum(original.box.numel for original in pieces)


def index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))

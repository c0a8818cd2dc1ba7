"""Flat ranges as boxes: they cover exactly the range, in order, and there are few of them."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distllm.layout.place import Place, flat_range_boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


@given(ranges())
def test_boxes_are_the_range_in_flat_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    boxes = flat_range_boxes(shape, start, stop)
    covered = [
        numbers[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))].ravel()
        for box in boxes
    ]
    flat = np.concatenate(covered).tolist() if covered else []
    assert flat == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    assert all(box.numel > 0 for box in boxes), "an empty box would collide with a real one in a checkpoint"


def test_offsets_of_the_part_are_added() -> None:
    place = Place("w", global_shape=(2, 8, 3), local_shape=(2, 4, 3), offsets=(0, 4, 0), primary=True)
    (box,) = place.boxes(12, 24)
    assert box.offsets == (1, 4, 0)
    assert box.sizes == (1, 4, 3)

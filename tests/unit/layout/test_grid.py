"""The rank grid is total: every rank has one place, and every group is a slice of one array."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.config.axes import AXES
from distllm.config.schema import Parallel
from distllm.layout.grid import Coordinates, Grid

degrees = st.sampled_from([1, 2, 3, 4, 8, 16])
grids = st.builds(Grid, data=st.integers(1, 64), tensor=degrees, pipeline=degrees)


def parallel(tensor: int = 1, pipeline: int = 1) -> Parallel:
    return Parallel(tensor, False, pipeline, 1, None, None, False, False)


@given(grids, st.data())
def test_coordinates_and_rank_are_inverse(grid: Grid, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, grid.world_size - 1))
    assert grid.rank(grid.coordinates(rank)) == rank


@given(grids)
def test_every_group_kind_partitions_the_world(grid: Grid) -> None:
    for axes in (combination for n in range(1, len(AXES)) for combination in itertools.combinations(AXES, n)):
        groups = grid.groups(*axes)
        size = math.prod(grid.degrees[axis] for axis in axes)
        assert groups.shape == (grid.world_size // size, size), axes
        assert sorted(groups.ravel().tolist()) == list(range(grid.world_size)), axes
        assert all((np.diff(row) > 0).all() for row in groups[:3]), axes


@given(grids)
def test_groups_differ_only_in_their_own_axis(grid: Grid) -> None:
    for axis in AXES:
        for row in grid.groups(axis)[:3]:
            places = [grid.coordinates(int(rank)) for rank in row]
            assert [place.of(axis) for place in places] == list(range(len(row)))
            assert len({place._replace(**{axis: 0}) for place in places}) == 1


def test_coordinates_are_named_in_the_order_of_the_axes() -> None:
    assert Coordinates._fields == AXES


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_far_apart() -> None:
    grid = Grid.of(parallel(tensor=2, pipeline=4), 16)
    assert grid.data == 2
    assert grid.coordinates(5) == Coordinates(pipeline=1, data=0, tensor=1)
    assert grid.groups("tensor")[0].tolist() == [0, 1]
    assert grid.groups("data")[0].tolist() == [0, 2]
    assert grid.groups("pipeline")[0].tolist() == [0, 4, 8, 12]
    assert grid.groups("pipeline", "tensor")[0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]


def test_drawing_shows_every_rank_of_a_small_grid() -> None:
    assert str(Grid(data=2, tensor=2, pipeline=2)) == (
        "           stage 0  stage 1\nreplica 0  [0 1]    [4 5]\nreplica 1  [2 3]    [6 7]"
    )


def test_drawing_of_a_large_grid_fits_a_screen() -> None:
    drawing = str(Grid.of(parallel(tensor=8, pipeline=16), 16_384))
    assert len(drawing.splitlines()) <= 8
    assert max(map(len, drawing.splitlines())) <= 120
    assert "16383" in drawing


def test_world_must_be_a_multiple_of_the_model_parallel_size() -> None:
    with pytest.raises(AssertionError, match="no multiple"):
        Grid.of(parallel(tensor=4), 6)

"""The rank grid is total: every rank has one place, and every group is a slice of one array."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.layout.grid import Coordinates, Grid

degrees = st.sampled_from([1, 2, 3, 4, 8, 16])
grids = st.builds(Grid, data=st.integers(1, 64), tensor=degrees, pipeline=degrees)


@given(grids, st.data())
def test_coordinates_and_rank_are_inverse(grid: Grid, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, grid.world_size - 1))
    assert grid.rank(grid.coordinates(rank)) == rank


@given(grids)
def test_every_group_kind_partitions_the_world(grid: Grid) -> None:
    sizes = {
        "tensor_groups": grid.tensor,
        "data_groups": grid.data,
        "pipeline_groups": grid.pipeline,
        "model_groups": grid.tensor * grid.pipeline,
    }
    for kind, size in sizes.items():
        groups = getattr(grid, kind)
        assert groups.shape == (grid.world_size // size, size), kind
        assert sorted(groups.ravel().tolist()) == list(range(grid.world_size)), kind


@given(grids)
def test_groups_differ_only_in_their_own_axis(grid: Grid) -> None:
    for kind, axis in (("tensor_groups", "tensor"), ("data_groups", "data"), ("pipeline_groups", "pipeline")):
        for row in getattr(grid, kind)[:3]:
            places = [grid.coordinates(int(rank)) for rank in row]
            assert [getattr(place, axis) for place in places] == list(range(len(row)))
            assert len({place._replace(**{axis: 0}) for place in places}) == 1


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_far_apart() -> None:
    grid = Grid.from_world_size(16, tensor=2, pipeline=4)
    assert grid.data == 2
    assert grid.coordinates(5) == Coordinates(pipeline=1, data=0, tensor=1)
    assert grid.tensor_groups[0].tolist() == [0, 1]
    assert grid.data_groups[0].tolist() == [0, 2]
    assert grid.pipeline_groups[0].tolist() == [0, 4, 8, 12]
    assert grid.model_groups[0].tolist() == [0, 1, 4, 5, 8, 9, 12, 13]


def test_drawing_shows_every_rank_of_a_small_grid() -> None:
    assert str(Grid(data=2, tensor=2, pipeline=2)) == (
        "           stage 0  stage 1\nreplica 0  [0 1]    [4 5]\nreplica 1  [2 3]    [6 7]"
    )


def test_drawing_of_a_large_grid_fits_a_screen() -> None:
    drawing = str(Grid.from_world_size(16_384, tensor=8, pipeline=16))
    assert len(drawing.splitlines()) <= 8
    assert max(map(len, drawing.splitlines())) <= 120
    assert "16383" in drawing


def test_world_must_be_a_multiple_of_the_model_parallel_size() -> None:
    with pytest.raises(AssertionError, match="no multiple"):
        Grid.from_world_size(6, tensor=4)

"""Groups that only their members make, and trees of them through which all ranks exchange small objects."""

from __future__ import annotations

import contextlib
import operator
import os
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import RanksFailedError, run_ranks
from torch.distributed import distributed_c10d

from distllm.bench.counting_store import CountingStore
from distllm.bench.fake_world import GRID, TREES, Group, store_operations
from distllm.layout import local_group
from distllm.layout.grid import Grid
from distllm.layout.local_group import new_local_group
from distllm.layout.save_groups import create_save_groups
from distllm.layout.tree import Tree

TIMEOUT = timedelta(seconds=20)


def exchange(rank: int) -> tuple[int, object, list[int], object, object]:
    tree = Tree.create(range(5), TIMEOUT, branches=2)
    gathered = tree.combine([rank], operator.add)
    everywhere = tree.agree([rank], operator.add)
    return (
        len(tree.groups),
        gathered,
        everywhere,
        tree.broadcast(f"from {rank}"),
        tree.first(None if rank < 3 else rank),
    )


def test_a_tree_combines_in_order_and_hands_out_what_its_root_has() -> None:
    results = run_ranks(5, exchange)
    assert [groups for groups, *_ in results] == [3, 1, 2, 1, 3]  # blocks (01)(23)(4), (02)(4), (04)
    assert [gathered for _, gathered, *_ in results] == [[0, 1, 2, 3, 4], None, None, None, None]
    assert all(everywhere == [0, 1, 2, 3, 4] for _, _, everywhere, _, _ in results)
    assert all(told == "from 0" and first == 3 for *_, told, first in results)


def operations(rank: int) -> int:
    """On the store, for a group of a tree that has exchanged objects."""
    count = 0

    def counted() -> None:
        nonlocal count
        count += 1

    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as on GPUs, where gloo carries objects only
    store = CountingStore(distributed_c10d._get_default_store(), counted)
    with mock.patch.object(distributed_c10d, "_get_default_store", return_value=store):
        assert dist.group.WORLD is not None
        distributed_c10d._world.pg_map[dist.group.WORLD] = ("gloo", store)
        tree = Tree.create(range(6), TIMEOUT)
        tree.agree([rank], operator.add)
        tree.meet()
    del os.environ["TORCH_GLOO_LAZY_INIT"]
    return count


def test_a_rank_connects_only_to_those_it_exchanges_with() -> None:
    """As `distllm bench startup world_size=N` reckons."""
    found = run_ranks(6, operations)
    expected = [store_operations({TREES: [Group(6, rank == 0)], GRID: []}) for rank in range(6)]
    assert all(0 < one <= most for one, most in zip(found, expected, strict=True)), found


def save_groups(rank: int) -> tuple[list[int], list[int] | None]:
    groups = create_save_groups(Grid(pipeline=2, data=2), TIMEOUT)
    return groups.stage.agree([rank], operator.add), groups.world.combine([rank], operator.add)


def test_the_tree_of_all_ranks_grows_out_of_those_of_the_stages() -> None:
    everyone = [0, 1, 2, 3]
    assert run_ranks(4, save_groups) == [([0, 1], everyone), ([0, 1], None), ([2, 3], None), ([2, 3], None)]


def sums_of_pairs(rank: int, is_named: bool) -> list[float]:
    """Rank 0 makes one more group; then both make one for each other, twice, the first destroyed."""
    as_torch_does = mock.patch.object(local_group, "_named", return_value=contextlib.nullcontext())
    sums = []
    with contextlib.nullcontext() if is_named else as_torch_does:
        new_local_group([0], TIMEOUT)
        for _ in range(2):
            group = new_local_group([0, 1], timedelta(seconds=3))
            value = torch.tensor([float(rank + 1)])
            dist.all_reduce(value, group=group)
            sums.append(value.item())
            dist.destroy_process_group(group)
    return sums


def test_ranks_that_have_made_other_groups_before_find_each_other() -> None:
    assert run_ranks(2, sums_of_pairs, True) == [[3.0, 3.0]] * 2


def test_with_the_names_that_torch_gives_they_do_not() -> None:
    with pytest.raises(RanksFailedError):
        run_ranks(2, sums_of_pairs, False, deadline_seconds=8)

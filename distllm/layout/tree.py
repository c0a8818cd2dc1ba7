"""Small objects of many ranks, combined and handed out through a tree of small groups.

A group of all ranks would connect each with all others: at 16,384 ranks more sockets than a process may open,
and as many operations on the rendezvous store. In a tree with 12 branches a rank has at most four groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from distllm.layout.local_group import new_local_group

T = TypeVar("T")
BRANCHES = 12


@dataclass(frozen=True)
class Tree:
    """This rank's groups in a tree of ranks, from the leaves up: the next as long as it leads the one before.

    None stands for the world group. Without groups the rank is alone.
    """

    groups: tuple[ProcessGroup | None, ...] = ()

    @classmethod
    def create(cls, ranks: Sequence[int], timeout: timedelta, branches: int = BRANCHES) -> Tree:
        """Return the tree of `ranks`, whose root is the first of them.

        Called by all ranks of the world alike, with the tree that they are in, and as many ranks in each.
        Objects lie in host memory, so where the world is NCCL's the tree is gloo's.
        """
        backend = "gloo" if dist.get_backend() == "nccl" else None
        rank, groups, members = dist.get_rank(), [], list(ranks)
        while len(members) > 1:
            blocks = [members[begin : begin + branches] for begin in range(0, len(members), branches)]
            own = next((block for block in blocks if rank in block), [])
            group = new_local_group(own, timeout, backend)
            groups += [group] if group is not None else []
            members = [block[0] for block in blocks]
        return cls(tuple(groups))

    def combine(self, value: T, combine: Callable[[T, T], T]) -> T | None:
        """Return all ranks' values combined on the root, None on other ranks. Collective.

        combine: associative; values are combined in the order of the ranks.
        """
        for group in self.groups:
            is_leader = dist.get_rank(group) == 0
            values: list[Any] | None = [None] * dist.get_world_size(group) if is_leader else None
            dist.gather_object(value, values, group=group, group_dst=0)
            if values is None:
                return None
            value = reduce(combine, values)
        return value

    def broadcast(self, value: T) -> T:
        """Return the root's value on every rank. Collective."""
        values = [value]
        for group in reversed(self.groups):
            dist.broadcast_object_list(values, group=group, group_src=0)
        return values[0]

    def agree(self, value: T, combine: Callable[[T, T], T]) -> T:
        """Return all ranks' values combined, on every rank. Collective."""
        combined = self.combine(value, combine)
        return self.broadcast(combined)  # type: ignore[return-value]  # the root has one

    def first(self, value: T | None) -> T | None:
        """Return the value of the first rank that has one, on every rank. Collective."""
        return self.agree(value, lambda a, b: b if a is None else a)

    def meet(self) -> None:
        """Wait until all ranks are here. Collective."""
        self.first(None)


WORLD = Tree((None,))  # one group of all ranks, for as many as one group may have

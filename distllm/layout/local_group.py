"""Process groups that only their members make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d


def new_local_group(
    ranks: Sequence[int], timeout: timedelta, backend: str | None = None
) -> ProcessGroup | None:
    """Return the group of `ranks`, None where this rank is not among them. All ranks call this equally often.

    Only the members take part, so the cost for a rank does not grow with the number of ranks. backend: None
    takes the world's.
    """
    distributed_c10d._world.group_count += 1
    if dist.get_rank() not in ranks:
        return None
    with _named(f"{distributed_c10d._world.group_count}/{ranks[0]}"):
        group = dist.new_group(list(ranks), timeout, backend, use_local_synchronization=True)
    assert isinstance(group, ProcessGroup), f"torch made {group} of ranks {ranks}, which include this one"
    return group


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the groups that are made meanwhile.

    The name is where their members meet in the store, so it must be equal on all members and used once. torch
    (2.11 to 2.13) hashes the members and how many groups this rank has: that differs between the stages of a
    pipeline, which wait for each other for ever, and repeats once a group was destroyed, so that a new one
    finds the addresses of the old one.
    """
    module: Any = distributed_c10d
    hashed = module._process_group_name
    module._process_group_name = lambda ranks, use_hashed_name: name
    try:
        yield
    finally:
        module._process_group_name = hashed

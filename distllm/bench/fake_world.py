"""`distllm bench startup world_size=N`: the start of one rank of a large job, played on this machine.

The process is rank r of N, under PyTorch's `fake` backend, whose collectives return at once: it goes through
groups, model, engine and the plan of its first checkpoint, as rank r would. What it does alone is measured
(seconds, memory, groups); what it would exchange with others is counted, and its time modelled.

Weights lie on the meta device, without memory; under ZeRO-3 the rank's parts of them are really there.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from distllm.bench.local_ranks import run_on_ranks
from distllm.bench.report import Report
from distllm.config.schema import Config

MIB = 1 << 20
TREES, GRID = "trees of objects", "the grid"
NCCL_SECONDS = 2.0  # to connect one communicator, of at most a few hundred ranks
RATE = "answers of the store per second"


@dataclass(frozen=True)
class Group:
    """A process group. is_leader: whether the rank is the first in it."""

    size: int
    is_leader: bool


@dataclass(frozen=True)
class Played:
    """The start of one rank. groups: that it made, by their use. peak_bytes: of the process."""

    rank: int
    seconds: dict[str, float]
    peak_bytes: int
    groups: dict[str, list[Group]]
    pieces: int
    bytes_to_save: int


def run(config: Config, vocab_size: int, world_size: int) -> Report:
    """Play the first, a middle and the last rank, one after the other, each in a process of its own."""
    ranks = sorted({0, world_size // 2, world_size - 1})
    played = [
        run_on_ranks(1, play, rank, config, vocab_size, world_size, starts_world=False)[0] for rank in ranks
    ]
    modelled = model_start(played, world_size)
    return Report(
        _table(played, modelled, world_size),
        {"world_size": world_size, "ranks": [asdict(one) for one in played], "modelled": modelled},
    )


def play(_: int, rank: int, config: Config, vocab_size: int, world_size: int) -> Played:
    """Start as `rank` of `world_size`, as far as a rank can alone."""
    seconds: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begin, 3)

    with phase("import libraries"):
        import torch
        import torch.distributed as dist
        import torch.testing._internal.distributed.fake_pg  # registers the backend `fake`

        from distllm.checkpoint.pieces import pieces_of
        from distllm.engine import zero as zero
        from distllm.layout.grid import Grid
        from distllm.layout.groups import create_groups
        from distllm.layout.save_groups import create_save_groups
        from distllm.layout.tree import Tree
        from distllm.objectives import create_objective
        from distllm.optimizers import recipe_of
        from distllm.runtime import cpu
        from distllm.trainer.build import build_engine

    timeout = timedelta(seconds=60)
    cpu.install()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=dist.HashStore())
    made: dict[str, list[Group]] = {TREES: [], GRID: []}
    device = torch.device("cpu" if config.zero.stage == 3 else "meta")
    objective = create_objective(config)
    with phase("make groups"):
        with _noted(made[TREES]):
            Tree.create(range(world_size), timeout)
        grid = Grid.of(config.parallel, world_size)
        with _noted(made[GRID]):
            groups = create_groups(grid, timeout, config.parallel.virtual_pipeline)
        with _noted(made[TREES]):
            create_save_groups(grid, timeout)
    with phase("build model and engine"):
        engine = build_engine(config, vocab_size, groups, device, objective)
    with phase("plan the first checkpoint"):
        states = dict.fromkeys(recipe_of(config.optimizer).states, torch.float32)
        pieces = pieces_of(fragment for fragment in engine.fragments(create_states=states) if fragment.writer)
    return Played(
        rank,
        seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        made,
        len(pieces),
        sum(piece.view.nbytes for piece in pieces),
    )


def model_start(played: Sequence[Played], world_size: int) -> dict[str, float]:
    """Return what a start of the whole job would take, in seconds, by what it waits for.

    The rendezvous store answers all ranks one after the other; the rate of its answers is measured here.
    """
    operations = [store_operations(one.groups) for one in played]
    typical = store_operations(played[len(played) // 2].groups)  # few lead others
    rate = store_rate()
    slowest = {name: max(one.seconds[name] for one in played) for name in played[0].seconds}
    return {
        "store operations of a rank, at most": max(operations),
        RATE: round(rate),
        "own work": round(sum(slowest.values()), 2),
        "rendezvous store": round(typical * world_size / rate, 2),
        "communicators": NCCL_SECONDS * sum(group.size > 1 for group in played[0].groups[GRID]),
    }


def store_operations(groups: Mapping[str, Sequence[Group]]) -> int:
    """Return a rank's operations on the store for its groups, at most.

    A rank of gloo's (TORCH_GLOO_LAZY_INIT=1) tells its address and asks for those it exchanges with, two
    operations each: the leader of a tree's group with all, another with its leader, the ranks beside it and
    those of a binomial tree (tests/ranks/test_tree.py counts them). NCCL's first rank tells the others an id
    per communicator, and another for messages to each stage beside.
    """
    of_trees = 0
    for group in groups[TREES]:
        partners = group.size - 1 if group.is_leader else 3 + math.ceil(math.log2(group.size))
        of_trees += 1 + 2 * min(partners, group.size - 1)
    of_grid = sum(1 for group in groups[GRID] if group.size > 1) + 4
    return 3 + of_trees + of_grid  # 3: to meet


def store_rate() -> float:
    """Return the operations a second that a store on this machine answers to one client over TCP."""
    import torch.distributed as dist

    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=30))
    client = dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=30))
    number, begin = 2000, time.perf_counter()
    for i in range(number):
        client.set(str(i), "x" * 64)
    return number / (time.perf_counter() - begin)


@contextmanager
def _noted(groups: list[Group]) -> Iterator[None]:
    """Note every group that is made meanwhile."""
    import torch.distributed as dist

    new_group = dist.new_group

    def noted(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        groups.append(Group(dist.get_world_size(group), dist.get_rank(group) == 0))
        return group

    dist.new_group = noted
    try:
        yield
    finally:
        dist.new_group = new_group


def _table(played: Sequence[Played], modelled: Mapping[str, float], world_size: int) -> str:
    lines = [f"{'rank':<40}" + "".join(f"{one.rank:>12,}" for one in played)]
    for name in played[0].seconds:
        lines.append(f"{name + ', s':<40}" + "".join(f"{one.seconds[name]:>12.2f}" for one in played))
    rows: dict[str, Callable[[Played], float]] = {
        "peak memory of the process, MiB": lambda one: one.peak_bytes / MIB,
        "process groups": lambda one: sum(map(len, one.groups.values())),
        "ranks of the largest": lambda one: max(group.size for made in one.groups.values() for group in made),
        "store operations": lambda one: store_operations(one.groups),
        "pieces of its first checkpoint": lambda one: one.pieces,
        "which are, MiB": lambda one: one.bytes_to_save / MIB,
    }
    lines += [f"{name:<40}" + "".join(f"{of(one):>12,.0f}" for one in played) for name, of in rows.items()]
    waits = {
        "own work": "the phases above on the slowest rank, with libraries from a local disk",
        "rendezvous store": f"with {modelled[RATE]:,} answers a second, as one here gives to one client",
        "communicators": f"{NCCL_SECONDS} s for each of NCCL: assumed, nothing here measures it",
    }
    total = sum(modelled[name] for name in waits)
    lines += ["", f"modelled for all {world_size:,} ranks: {total:.0f} s, of which"]
    lines += [f"{modelled[name]:>10.1f} s  {name}: {meaning}" for name, meaning in waits.items()]
    return "\n".join(lines)

"""`distllm bench startup`: the overhead of a start by the number of ranks, extrapolated to 16,384.

Every rank is a process of this machine, data-parallel unless the overrides say otherwise; the work of each
stays the same. Processor seconds are each rank's own; wall time is not, where ranks outnumber cores. It
counts operations on the rendezvous store, process groups created, and bytes of collectives outside of
training (objects that ranks gather), and fits them to 1, log n and n.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from distllm.bench.local_ranks import run_on_ranks
from distllm.bench.report import Report
from distllm.bench.scaling import fit
from distllm.config import compose
from distllm.config.schema import Config

DEFAULT_RANKS = (1, 2, 4, 8, 16)
LARGE = 16_384
QUANTITIES = ("processor_seconds", "store_operations", "groups_made", "collective_bytes")
PHASES = (
    "import libraries",
    "compose and validate",
    "open data",
    "rendezvous",
    "agree on config and start",
    "make groups",
    "build model and engine",
    "first step",
    "save checkpoint",
)


@dataclass
class Cost:
    """The cost of one phase on one rank. collective_bytes: as distllm/layout/traffic.py counts messages."""

    wall_seconds: float = 0.0
    processor_seconds: float = 0.0
    store_operations: int = 0
    groups_made: int = 0
    collective_bytes: int = 0


@dataclass
class _Counts:
    store_operations: int = 0
    groups_made: int = 0
    costs: dict[str, Cost] = field(default_factory=dict)
    stores: list[Any] = field(default_factory=list)  # kept alive: see counting_store.py

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.store_operations, self.groups_made, time.perf_counter(), time.process_time()
        yield
        self.costs[name] = Cost(
            time.perf_counter() - before[2],
            time.process_time() - before[3],
            self.store_operations - before[0],
            self.groups_made - before[1],
        )


def run(
    config: Config, vocab_size: int, overrides: Sequence[str] = (), ranks: Sequence[int] = DEFAULT_RANKS
) -> Report:
    """Measure starts on every number of `ranks`.

    overrides: of the job, as on the command line, since every rank composes its configuration itself; its
        data are synthetic, and its batch grows with the ranks.
    """
    by_ranks: dict[int, dict[str, Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="distllm-startup-") as folder:
        write_corpus(Path(folder))
        for number in ranks:
            results = run_on_ranks(
                number, measure, tuple(overrides), folder, deadline_seconds=900, starts_world=False
            )
            by_ranks[number] = {phase: _dearest([costs[phase] for costs in results]) for phase in PHASES}
    growth = _growth(by_ranks) if len(by_ranks) >= 3 else []
    found = {
        "ranks": {str(n): {p: asdict(cost) for p, cost in costs.items()} for n, costs in by_ranks.items()},
        "growth": growth,
    }
    return Report(_table(by_ranks, growth), found)


def write_corpus(folder: Path) -> None:
    words = ["of", "the", "and", "to", "in", "is", "that", "it", "for", "was", "on", "are", "as", "with"]
    (folder / "corpus").mkdir()
    for number in range(20):
        text = " ".join(words[(number + i * i) % len(words)] for i in range(2000))
        (folder / "corpus" / f"{number:02}.txt").write_text(text)


def measure(rank: int, overrides: tuple[str, ...], folder: str) -> dict[str, Cost]:
    """Measure all phases of a start on this rank."""
    counts = _Counts()
    with counts.phase("import libraries"):
        from distllm.engine import zero as zero
        from distllm.trainer import job as job
    _count_store_and_groups(counts)
    from distllm.checkpoint.async_writer import Saver
    from distllm.checkpoint.store import Contents
    from distllm.config.compose import config_hash
    from distllm.data.loader import StepShape
    from distllm.data.preparation.prepare import prepare
    from distllm.layout.grid import Grid
    from distllm.layout.groups import create_groups, destroy_groups
    from distllm.layout.save_groups import create_save_groups
    from distllm.objectives import create_objective
    from distllm.runtime import dist
    from distllm.runtime.collective_counter import CollectiveCounter
    from distllm.trainer.batches import Batches
    from distllm.trainer.build import build_engine
    from distllm.trainer.open_data import open_data
    from distllm.trainer.resume import find_start

    counter = CollectiveCounter(None)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        before = _total_bytes(counter)
        with counts.phase(name):
            yield
        counts.costs[name].collective_bytes = _total_bytes(counter) - before

    arguments = job_overrides(overrides, Path(folder))
    with phase("compose and validate"):
        config = compose.load(compose.parse("train", arguments))
    prepare(config.data, config.preparation, config.tokenizer, lambda _: None)  # once, not part of a start
    with phase("open data"):
        prepared = prepare(config.data, config.preparation, config.tokenizer, lambda _: None)
        data = open_data(config, prepared, lambda _: None)
    with phase("rendezvous"):
        runtime = dist.start(timedelta(seconds=600))
    grid = Grid.of(config.parallel, runtime.world_size)
    with counter, phase("agree on config and start"):
        dist.assert_equal_on_all_ranks(runtime.everyone, "config", config_hash(config))
        start = find_start(config, prepared, data, runtime.everyone)
    with counter, phase("make groups"):
        groups = create_groups(grid, runtime.timeout, config.parallel.virtual_pipeline)
        save_groups = create_save_groups(grid, runtime.timeout)
    with counter, phase("build model and engine"):
        objective = create_objective(config)
        engine = build_engine(config, prepared.vocab_size, groups, runtime.device, objective)
    shape = StepShape(config.train.global_batch_size, config.train.micro_batch_size, groups.samples.size)
    feed = Batches(
        data.training, shape, groups.samples.rank, create_objective(config), runtime.device, prefetch=0
    )
    with phase("first step"):  # its traffic belongs to training
        state = start.state.planned(config.train.global_batch_size, config.data.weights_at(0))
        engine.train_step(feed.microbatches(state), config.optimizer.lr)
    with counter, phase("save checkpoint"):
        engine.before_save()
        path = Path(folder) / f"checkpoint_{runtime.world_size}"
        saver = Saver(save_groups, is_async=False)
        saver.save(path, engine.fragments(), Contents(1, engine.scalars(), {}), after=lambda: None)
        errors = [outcome.error for outcome in saver.outcomes() if outcome.error]
        assert not errors, f"the checkpoint was not written: {errors}"
    feed.close()
    destroy_groups()
    dist.stop(runtime, succeeded=True)
    return counts.costs


def job_overrides(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the job's overrides with data of `folder`, and one microbatch per rank: weak scaling."""
    import os

    batch = 2 * int(os.environ["WORLD_SIZE"])
    return [
        "model=tiny",
        "tokenizer=bytes",
        "data=text",
        f"data.path={folder}/corpus/*.txt",
        f"data.cache={folder}/cache",
        "data.validation_fraction=0",
        "train.validation_interval=0",
        f"run.dir={folder}/run_{batch}",
        f"train.global_batch_size={batch}",
        "train.micro_batch_size=2",
        *overrides,
    ]


def _total_bytes(counter: Any) -> int:
    return sum(amount.bytes for amount in counter.traffic().values())


def _count_store_and_groups(counts: _Counts) -> None:
    """Put a counting store under the world group, and count the calls of `new_group`."""
    import torch.distributed as torch_dist
    from torch.distributed import distributed_c10d

    from distllm.bench.counting_store import CountingStore

    def count() -> None:
        counts.store_operations += 1

    rendezvous, new_group = distributed_c10d.rendezvous, torch_dist.new_group

    def counted_rendezvous(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
        for store, rank, world_size in rendezvous(*args, **kwargs):
            counts.stores.append(CountingStore(store, count))
            yield counts.stores[-1], rank, world_size

    def counted_new_group(*args: Any, **kwargs: Any) -> Any:
        counts.groups_made += 1
        return new_group(*args, **kwargs)

    distributed_c10d.rendezvous = counted_rendezvous
    torch_dist.new_group = counted_new_group


def _dearest(costs: Sequence[Cost]) -> Cost:
    """Return the largest of all ranks, quantity by quantity: all wait for the slowest."""
    return Cost(**{name: max(asdict(cost)[name] for cost in costs) for name in asdict(costs[0])})


def _growth(by_ranks: Mapping[int, Mapping[str, Cost]]) -> list[dict[str, Any]]:
    """Fit every nonzero quantity of every phase; worst growth first."""
    found = []
    for phase in PHASES:
        for quantity in QUANTITIES:
            # A single rank sends nothing, so its point is not on the line.
            points = {n: c for n, c in by_ranks.items() if n > 1 or quantity != "collective_bytes"}
            values = [float(getattr(costs[phase], quantity)) for costs in points.values()]
            if any(values) and len(points) >= 3:
                fitted = fit(list(points), values)
                found.append(
                    {"phase": phase, "quantity": quantity, **asdict(fitted), f"at_{LARGE}": fitted.at(LARGE)}
                )
    order = ["n", "log n", "1"]
    return sorted(found, key=lambda item: order.index(item["growth"]))


def _table(by_ranks: Mapping[int, Mapping[str, Cost]], growth: Sequence[Mapping[str, Any]]) -> str:
    titles = {
        "wall_seconds": "wall seconds of the slowest rank (ranks may outnumber cores)",
        "processor_seconds": "processor seconds of a rank, at most",
        "store_operations": "operations of a rank on the rendezvous store, at most",
        "groups_made": "process groups that a rank creates or registers",
        "collective_bytes": "bytes of messages of a rank outside of training",
    }
    lines = []
    for quantity, title in titles.items():
        lines.append(f"{title:<64}" + "".join(f"{f'n={n}':>10}" for n in by_ranks))
        for phase in PHASES:
            values = [getattr(costs[phase], quantity) for costs in by_ranks.values()]
            if any(values):
                texts = (f"{v:>10.3f}" if isinstance(v, float) else f"{v:>10,}" for v in values)
                lines.append(f"    {phase:<60}" + "".join(texts))
    fast = [item for item in growth if item["growth"] == "n"]
    lines.append(f"grows faster than log n: fitted, and what that would be on {LARGE:,} ranks")
    for item in fast:
        formula = f"{item['constant']:.4g} + {item['slope']:.4g} n"
        name = f"{item['phase']}: {item['quantity'].replace('_', ' ')}"
        lines.append(f"    {name:<56}{formula:<28}{item[f'at_{LARGE}']:>16,.1f}")
    return "\n".join(lines)

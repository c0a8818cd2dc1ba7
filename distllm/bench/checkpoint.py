"""`distllm bench checkpoint`: saves and loads of the job's own model and optimizer, in bench.folder.

After one step on random tokens, so that the optimizer has its states. Every save is flushed to the disk, and
files leave the page cache before they are loaded. Of several ranks the slowest counts.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from distllm.bench.engine import LEARNING_RATE, world
from distllm.bench.report import Report, Spread
from distllm.bench.saving import Way, at_once, forget, time_way
from distllm.checkpoint.async_writer import Saver
from distllm.checkpoint.manifest import find_damage
from distllm.checkpoint.store import Contents, read_tensors
from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.layout.save_groups import create_save_groups
from distllm.layout.tree import Tree
from distllm.metrics.format import block, bytes_, plural
from distllm.runtime.dist import on_main_rank

CHECKPOINT = "step_00000001"


@dataclass(frozen=True)
class Measured:
    """Times of the slowest rank, in seconds.

    speed: of the main thread while a save is written, relative to an idle process; None where nothing is left
        to write once training continues.
    """

    what: str
    blocking_seconds: Spread
    seconds: Spread
    speed: float | None


def run(config: Config, vocab_size: int) -> Report:
    """Measure saves and loads in a folder that all ranks share. Collective: on every rank of the job."""
    with world(config, vocab_size) as started:
        engine = started.build(config)
        engine.train_step(started.microbatches, LEARNING_RATE)
        folder = Path(
            on_main_rank(
                started.runtime.everyone,
                lambda: tempfile.mkdtemp(prefix="bench-checkpoint-", dir=config.bench.folder),
            )
        )
        try:
            rows = list(_measure(config, engine, folder / CHECKPOINT, started.runtime.everyone))
            num_bytes = sum(
                file.stat().st_size for file in (folder / CHECKPOINT).rglob("*") if file.is_file()
            )
            started.runtime.everyone.meet()
        finally:
            if started.runtime.is_main:
                shutil.rmtree(folder, ignore_errors=True)
    results = {"bytes": num_bytes, "rows": [asdict(row) for row in rows]}
    return Report(table(rows, num_bytes, started.runtime.world_size), results)


def _measure(config: Config, engine: Engine, path: Path, everyone: Tree) -> Iterator[Measured]:
    groups = create_save_groups(engine.groups.grid, timedelta(seconds=config.checkpoint.timeout_seconds))
    contents = Contents(1, engine.scalars(), {})

    def save(saver: Saver) -> Callable[[], bool]:
        saver.save(path, engine.fragments(), contents, after=lambda: None)
        return lambda: _is_saved(saver)

    def load() -> None:
        read_tensors(path, engine.fragments())

    def verify_and_load() -> None:
        damage = find_damage(path)
        assert damage is None, f"what was just written is damaged: {damage}"
        load()

    later = Saver(groups, is_async=True)
    ways = [
        Way("save at once", lambda: save(Saver(groups, is_async=False))),
        Way("first save in the background", lambda: save(Saver(groups, is_async=True))),
        Way("every other", lambda: save(later)),
        Way("load", at_once(load), is_load=True),
        Way("verify and load", at_once(verify_and_load), is_load=True),
    ]
    _remove(path, everyone)
    save(later)  # allocates its memory, which later saves reuse
    later.wait()
    later.outcomes()
    for way in ways:
        yield _repeated(way, path, config.bench.repeats, everyone)


def _is_saved(saver: Saver) -> bool:
    outcomes = saver.outcomes()
    errors = [outcome.error for outcome in outcomes if outcome.error]
    assert not errors, f"a save failed: {errors[0]}"
    return bool(outcomes)


def _repeated(way: Way, path: Path, repeats: int, everyone: Tree) -> Measured:
    timings = []
    for _ in range(repeats):
        forget(path) if way.is_load else _remove(path, everyone)
        everyone.meet()
        timings.append(time_way(way))
        everyone.meet()
    blocking = everyone.agree([t.blocking_seconds for t in timings], _slowest)
    whole = everyone.agree([t.seconds for t in timings], _slowest)
    speeds = [timing.speed for timing in timings if timing.speed is not None]
    speed = Spread.of(speeds).median if speeds else None
    return Measured(way.what, Spread.of(blocking), Spread.of(whole), speed)


def _slowest(a: list[float], b: list[float]) -> list[float]:
    return [max(pair) for pair in zip(a, b, strict=True)]


def _remove(path: Path, everyone: Tree) -> None:
    on_main_rank(everyone, lambda: shutil.rmtree(path, ignore_errors=True))


def table(rows: list[Measured], num_bytes: int, world_size: int) -> str:
    lines = [f"{'':<30}{'stands still':>13}{'takes':>10}{'MB/s':>9}{'speed meanwhile':>17}"]
    for row in rows:
        speed = "" if row.speed is None else f"{row.speed:.2f}"
        rate = num_bytes / row.seconds.median / 1e6
        blocking = f"{row.blocking_seconds.median:.3f} s"
        lines.append(
            f"{row.what:<30}{blocking:>13}{row.seconds.median:>8.3f} s{rate:>9,.0f}{speed:>17}".rstrip()
        )
    heading = f"distllm bench checkpoint: {plural(world_size, 'rank')}, {bytes_(num_bytes)}"
    return block(heading, {"": "\n".join(lines)})

"""`distllm bench recompute`: the time that recomputing activations costs this job, and the memory it saves.

Model, layout and batch are the job's own; from one row to the next only `recompute` changes. The rows take
turns, in `bench.repeats` rounds of `bench.steps` steps, each with an engine of its own. Layers are those of a
stage. The last column is the exchange: milliseconds of a step for each GiB that the rank with most memory no
longer needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from distllm.bench.engine import LEARNING_RATE, World, world
from distllm.bench.report import Report, Spread, device_name
from distllm.bench.timing import PeakMemory, over_ranks, repeated_seconds
from distllm.config import rules
from distllm.config.schema import Config, Recompute
from distllm.config.stages import pipeline_stages
from distllm.metrics.format import block, bytes_, plural

GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """One row. recompute: as in the configuration. peak_memory_bytes: of the rank that needs most."""

    recompute: Recompute
    step_seconds: Spread
    peak_memory_bytes: int

    def __str__(self) -> str:
        granularity, number = self.recompute.granularity, self.recompute.num_layers
        if granularity != "full":
            return granularity
        return "all layers" if number is None else plural(number, "layer")


def run(config: Config, vocab_size: int) -> Report:
    """Measure every variant. Collective: on every rank of the job."""
    with world(config, vocab_size) as started:
        rows = measure(config, started)
        title = f"distllm bench recompute: {plural(started.runtime.world_size, 'rank')}, {device_name()}"
    return Report(block(title, _table(rows)), {"rows": [asdict(row) for row in rows]})


def variants(config: Config, world_size: int) -> list[Recompute]:
    """Return the variants that the job's layout allows.

    They recompute nothing, the attention cores, and more and more whole layers.
    """
    most = max(len(c) for s in pipeline_stages(config.model.num_layers, config.parallel) for c in s.chunks)
    parts = sorted({math.ceil(most * part / 4) for part in (1, 2, 3)} - {most})
    full = [Recompute("full", number) for number in (*parts, None)]
    candidates = [Recompute("none", None), Recompute("selective", None), *full]
    return [r for r in candidates if not rules.check(replace(config, recompute=r), world_size)]


def measure(config: Config, started: World) -> list[Measured]:
    ways = variants(config, started.runtime.world_size)
    seconds: list[list[float]] = [[] for _ in ways]
    memory = [0] * len(ways)
    for _ in range(config.bench.repeats):
        for i, recompute in enumerate(ways):
            of_steps, peak = _measure_once(replace(config, recompute=recompute), started)
            seconds[i] += of_steps
            memory[i] = max(memory[i], peak)
    return [Measured(*row) for row in zip(ways, map(Spread.of, seconds), memory, strict=True)]


def _measure_once(config: Config, started: World) -> tuple[list[float], int]:
    """Return the seconds of each step, and the most bytes on a rank."""
    device, bench = started.runtime.device, config.bench
    peak = PeakMemory(device)
    engine = started.build(config)
    seconds = repeated_seconds(
        lambda: engine.train_step(started.microbatches, LEARNING_RATE),
        device,
        bench.warmup_steps,
        bench.steps,
    )
    return seconds, int(over_ranks(peak.extra_bytes(), dist.ReduceOp.MAX))


def _table(rows: Sequence[Measured]) -> dict[str, str]:
    first = rows[0]
    table: dict[str, str] = {"recompute": f"{'step':>10}{'memory':>14}{'costs':>10}{'saves':>14}"}
    for row in rows:
        cost = row.step_seconds.median - first.step_seconds.median
        saved = first.peak_memory_bytes - row.peak_memory_bytes
        cells = f"{row.step_seconds.median:>8.4g} s{bytes_(row.peak_memory_bytes):>14}"
        if row is not first:
            cells += f"{cost / first.step_seconds.median:>10.1%}"
            cells += f"{bytes_(saved):>14}" if saved > 0 else f"{'nothing':>14}"
            cells += f"  {cost * 1000 / (saved / GIB):,.0f} ms for a GiB" if saved > 0 else ""
        table[str(row)] = cells
    return table

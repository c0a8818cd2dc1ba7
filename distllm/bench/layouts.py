"""`distllm bench layouts`: real steps of a job's model under many layouts on local ranks; seconds, and bytes
counted and predicted.

All ranks share this machine's processors, so the seconds compare layouts with each other on it and predict
no cluster; calls and bytes are those of any cluster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Literal

from distllm.bench.local_ranks import run_on_ranks
from distllm.bench.report import Report, Spread
from distllm.config import rules
from distllm.config.schema import Config
from distllm.layout.traffic import Amount, Transfer, add_up
from distllm.metrics.format import bytes_

WARMUP_STEPS = 2  # stage 3 sends more in its first step than in any other


@dataclass(frozen=True)
class Layout:
    """A layout to measure; data parallelism is the rest of `ranks`."""

    ranks: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.pipeline)

    def __str__(self) -> str:
        degrees = {"TP": self.tensor, "PP": self.pipeline, "DP": self.data}
        name = " x ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1) or "1 rank"
        name += ", SP" if self.sequence else ""
        name += f", {self.virtual_pipeline} chunks" if self.virtual_pipeline > 1 else ""
        return name + (f", ZeRO-{self.zero_stage}" if self.data > 1 else "")

    def applied_to(self, config: Config) -> Config:
        """Return the job with this layout instead of its own."""
        parallel = replace(
            config.parallel,
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline,
        )
        zero = replace(config.zero, stage=self.zero_stage)
        return replace(config, parallel=parallel, zero=zero)


STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
DEFAULT_LAYOUTS = (
    Layout(1),
    *(Layout(2, zero_stage=stage) for stage in STAGES),
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True),
    Layout(2, pipeline=2),
    Layout(2, pipeline=2, virtual_pipeline=2),
    *(Layout(4, zero_stage=stage) for stage in STAGES),
    Layout(4, tensor=2, sequence=True, zero_stage=1),
    Layout(4, pipeline=2, zero_stage=1),
    Layout(4, tensor=2, pipeline=2),
    Layout(4, pipeline=4),
    Layout(8, zero_stage=3),
    *(Layout(8, tensor=2, pipeline=2, zero_stage=stage) for stage in STAGES),
    Layout(8, tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, zero_stage=1),
)


@dataclass(frozen=True)
class Measured:
    """The measurements of one rank.

    seconds: of each timed step. counted, predicted: of one step, by "group kind".
    """

    seconds: list[float]
    counted: dict[Transfer, Amount]
    predicted: dict[Transfer, Amount]


def run(
    config: Config,
    vocab_size: int,
    layouts: Sequence[Layout] = DEFAULT_LAYOUTS,
    steps: int | None = None,
) -> Report:
    """Measure every layout; those that this job's model and batch forbid are listed with the reason."""
    refused: dict[Layout, str] = {}
    by_ranks: dict[int, list[Layout]] = {}
    for layout in layouts:
        problems = rules.check(layout.applied_to(config), layout.ranks)
        if problems:
            refused[layout] = f"{problems[0].setting}={problems[0].value} {problems[0].rule}"
        else:
            by_ranks.setdefault(layout.ranks, []).append(layout)
    measured: dict[Layout, list[Measured]] = {}
    for ranks, of_size in by_ranks.items():
        configs = [layout.applied_to(config) for layout in of_size]
        results = run_on_ranks(ranks, measure, configs, vocab_size, steps or config.bench.steps)
        measured |= {layout: [of_rank[i] for of_rank in results] for i, layout in enumerate(of_size)}
    rows = [_row(layout, measured[layout]) for layout in layouts if layout in measured]
    reasons = {str(layout): why for layout, why in refused.items()}
    return Report(_table(rows, reasons), {"layouts": rows, "refused": reasons})


def measure(rank: int, configs: Sequence[Config], vocab_size: int, steps: int) -> list[Measured]:
    """Measure each job on this rank; called on all ranks alike, in a started world."""
    return [_measure_one(config, vocab_size, steps) for config in configs]


def _measure_one(config: Config, vocab_size: int, steps: int) -> Measured:
    import torch
    import torch.distributed as dist

    from distllm.engine.microbatch import Microbatch
    from distllm.layout.grid import Grid
    from distllm.layout.groups import create_groups, release_groups
    from distllm.objectives import create_objective
    from distllm.plan.communication import rank_traffic
    from distllm.plan.rank_view import RankView
    from distllm.runtime.collective_counter import CollectiveCounter
    from distllm.trainer.build import build_engine

    parallel, train = config.parallel, config.train
    grid = Grid.of(parallel, dist.get_world_size())
    groups = create_groups(grid, timedelta(seconds=300), parallel.virtual_pipeline)
    engine = build_engine(config, vocab_size, groups, torch.device("cpu"), create_objective(config))
    generator = torch.Generator().manual_seed(groups.samples.rank)
    shape = (train.micro_batch_size, config.model.seq_length + 1)
    number = train.global_batch_size // (train.micro_batch_size * groups.samples.size)
    batch = [Microbatch(torch.randint(0, vocab_size, shape, generator=generator)) for _ in range(number)]
    seconds = []
    for _ in range(WARMUP_STEPS + steps):
        dist.barrier()
        begin = time.perf_counter()
        engine.train_step(batch, config.optimizer.lr)
        seconds.append(time.perf_counter() - begin)
    with CollectiveCounter(groups) as counter:
        engine.train_step(batch, config.optimizer.lr)
    predicted = rank_traffic(
        RankView(config, vocab_size, grid, groups.coordinates.pipeline), has_weights=False
    )
    engine.release()
    release_groups(groups)
    return Measured(seconds[WARMUP_STEPS:], dict(counter.traffic()), predicted)


def _row(layout: Layout, ranks: Sequence[Measured]) -> dict[str, Any]:
    """Make a row of the table: sums over all ranks, and the step time of the slowest rank."""
    slowest = [max(of_step) for of_step in zip(*(rank.seconds for rank in ranks), strict=True)]
    counted = add_up(item for rank in ranks for item in rank.counted.items())
    predicted = add_up(item for rank in ranks for item in rank.predicted.items())
    total = sum(amount.bytes for amount in counted.values())
    expected = sum(amount.bytes for amount in predicted.values())
    return {
        "layout": str(layout),
        "settings": asdict(layout),
        "step_seconds": asdict(Spread.of(slowest)),
        "counted_bytes": total,
        "predicted_bytes": expected,
        "ratio": total / expected if expected else None,
        "by_transfer": {
            f"{transfer.group} {transfer.kind}": {
                "counted": counted.get(transfer, Amount(0, 0))._asdict(),
                "predicted": predicted.get(transfer, Amount(0, 0))._asdict(),
            }
            for transfer in sorted(counted | predicted)
        },
    }


def _table(rows: Sequence[Mapping[str, Any]], refused: Mapping[str, str]) -> str:
    lines = [
        f"{'layout':<36}{'step':>9}{'least':>9}{'most':>9}{'counted':>12}{'predicted':>12}  ratio",
        "bytes are sums over all ranks of the messages that they handle in one step",
    ]
    for row in rows:
        seconds = row["step_seconds"]
        times = "".join(f"{1000 * seconds[k]:>6.1f} ms" for k in ("median", "least", "most"))
        ratio = "" if row["ratio"] is None else f"  {row['ratio']:.6f}"
        sizes = f"{bytes_(row['counted_bytes']):>12}{bytes_(row['predicted_bytes']):>12}"
        lines.append(f"{row['layout']:<36}{times}{sizes}{ratio}")
        for name, amounts in row["by_transfer"].items():
            counted, predicted = amounts["counted"], amounts["predicted"]
            lines.append(
                f"    {name:<32}{counted['calls']:>14,} calls ({predicted['calls']:,})"
                f"  {bytes_(counted['bytes'])} ({bytes_(predicted['bytes'])})"
            )
    lines += [f"{name}: not possible for this job, since {why}" for name, why in refused.items()]
    return "\n".join(lines)

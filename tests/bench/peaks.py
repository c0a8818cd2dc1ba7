"""Peak memory of a rank beside what `distllm check` promises: a start and two steps, a resume, `generate`.

    python tests/bench/peaks.py [--json FILE] [--only TEXT]

Gloo ranks on this machine, 155 million parameters. Measured: the most anonymous memory of any rank above what
the process held before (tests/anonymous.py), after a tiny job in the same process has touched what every job
does. Predicted: distllm/plan/memory.py with `cluster=cpu`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jobs
import torch
from anonymous import PeakAnonymous
from harness import run_ranks

from distllm.checkpoint.async_writer import Saver
from distllm.checkpoint.store import Contents, read_tensors
from distllm.layout.grid import Grid
from distllm.layout.groups import create_groups, release_groups
from distllm.layout.save_groups import create_save_groups
from distllm.metrics.environment import describe_environment
from distllm.model.build import build_model
from distllm.model.parameters import count_parameters
from distllm.plan.memory import estimate_memory
from distllm.runtime import quiet
from distllm.trainer.resume import restore
from distllm.verbs.generate import _weight_fragments

MODEL = (
    "model.num_layers=12",
    "model.hidden_size=1024",
    "model.ffn_hidden_size=2816",
    "model.num_attention_heads=16",
    "model.num_query_groups=16",
    "train.micro_batch_size=1",
    "zero.bucket_size=5_000_000",
    "zero.persistence_threshold=10_000",
    "cluster=cpu",
)
TRAIN, RESUME, GENERATE = "start, 2 steps", "resume, 1 step", "generate"


@dataclasses.dataclass(frozen=True)
class Case:
    """What `world_size` ranks do under a ZeRO stage."""

    action: str
    world_size: int
    precision: str
    stage: int

    @property
    def overrides(self) -> tuple[str, ...]:
        batch = f"train.global_batch_size={self.world_size}"
        return (*MODEL, batch, f"train.precision={self.precision}", f"zero.stage={self.stage}")

    def __str__(self) -> str:
        return f"{self.action}, DP{self.world_size}, {self.precision}, ZeRO {self.stage}"


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes. measured: of the fullest rank."""

    case: Case
    parameters: int
    measured: int
    predicted: int


def cases() -> Iterator[Case]:
    """ZeRO-3 on 8 ranks; what keeps more on each of them on fewer, which fit in 24 GiB."""
    for precision in ("fp32", "bf16"):
        for stage, world_size in ((0, 2), (1, 4), (2, 4), (3, 8)):
            yield Case(TRAIN, world_size, precision, stage)
    for stage, world_size in ((0, 2), (1, 4), (2, 4), (3, 8)):
        yield Case(RESUME, world_size, "fp32", stage)
    yield Case(GENERATE, 1, "fp32", 0)


def peak(rank: int, case: Case, folder: Path) -> int:
    """Bytes that this rank needed at most."""
    _act(Case(TRAIN, case.world_size, case.precision, case.stage), ("model.num_layers=1", *TINY), folder)
    if case.action != TRAIN:
        _save(case, folder)
    with PeakAnonymous() as memory:
        _act(case, (), folder)
    return memory.extra_bytes


TINY = (
    "model.hidden_size=64",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "model.num_query_groups=2",
)


def _act(case: Case, changes: tuple[str, ...], folder: Path) -> None:
    config = jobs.make_config(*case.overrides, *changes)
    if case.action == GENERATE:
        groups = create_groups(Grid(), jobs.TIMEOUT)
        built = build_model(config, jobs.VOCAB_SIZE, groups, torch.device("cpu"), draws=False)
        read_tensors(folder / "step", _weight_fragments(built.places))
        release_groups(groups)
        return
    engine = jobs.build_engine(config)
    if case.action == RESUME:
        restore(engine, folder / "step")
    for step in range(2 if case.action == TRAIN else 1):
        engine.train_step(jobs.microbatches(step, config, engine.groups), 1e-3)
    jobs.finish(engine)


def _save(case: Case, folder: Path) -> None:
    """Write the checkpoint that the case reads."""
    engine = jobs.build_engine(jobs.make_config(*case.overrides))
    states = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    fragments = engine.fragments(create_states=states)
    saver = Saver(create_save_groups(engine.groups.grid, timedelta(seconds=300)), is_async=False)
    saver.save(folder / "step", fragments, Contents(1, {"step": 1.0}, {}), after=lambda: None)
    assert all(outcome.error is None for outcome in saver.outcomes())
    del fragments, saver
    jobs.finish(engine)


def measure(selected: Sequence[Case]) -> Iterator[Row]:
    for case in selected:
        with tempfile.TemporaryDirectory(prefix="peaks-") as folder:
            peaks = run_ranks(case.world_size, peak, case, Path(folder), deadline_seconds=600)
        config = jobs.make_config(*case.overrides)
        yield Row(case, count_parameters(config.model, jobs.VOCAB_SIZE).total, max(peaks), predict(case))


def predict(case: Case) -> int:
    """Bytes that the planner counts for it."""
    config = jobs.make_config(*case.overrides)
    if case.action == GENERATE:  # weights alone, in the precision of the checkpoint
        return 4 * count_parameters(config.model, jobs.VOCAB_SIZE).total
    return sum(estimate_memory(config, jobs.VOCAB_SIZE, Grid.of(config.parallel, case.world_size)).values())


def table(rows: Sequence[Row]) -> str:
    """Markdown, in bytes per parameter of the model."""
    lines = ["| what | DP | precision | ZeRO | measured | predicted | difference |", "|-|-:|-|-:|-:|-:|-:|"]
    for row in rows:
        case, measured, predicted = row.case, row.measured / row.parameters, row.predicted / row.parameters
        cells = [case.action, str(case.world_size), case.precision, str(case.stage)]
        figures = [f"{measured:.2f}", f"{predicted:.2f}", f"{row.measured / row.predicted - 1:+.0%}"]
        lines.append("| " + " | ".join([*cells, *figures]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "results" / f"peaks_cpu_{datetime.now(UTC):%Y-%m-%d}.json"
    parser.add_argument("--json", type=Path, default=default)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    arguments = parser.parse_args()
    quiet.silence()
    rows = []
    for row in measure([case for case in cases() if arguments.only in str(case)]):
        print(f"{row.case}: {row.measured / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
        rows.append(row)
    print(table(rows))
    results = {"environment": describe_environment(), "rows": [dataclasses.asdict(row) for row in rows]}
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

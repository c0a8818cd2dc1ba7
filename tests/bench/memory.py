"""Bytes of weights, gradients and optimizer states per rank, as allocated, beside what is predicted.

    python tests/bench/memory.py [--json FILE]

Gloo ranks on this machine. Measured: tests/allocated.py, the most over the ranks of a pipeline stage.
Predicted: distllm/plan/memory.py. Paper: Rajbhandari et al. 2020 (arXiv:1910.02054, table 1), 2 + 2 + 12
bytes per parameter in mixed precision with Adam, partitioned by the stage; for fp32 likewise 4 + 4 + 8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from allocated import KINDS, Comparison, compare
from harness import run_ranks

from distllm.metrics.environment import describe_environment
from distllm.runtime import quiet

VOCAB_SIZE = 300
# 9 million parameters: the largest is 4% of them, and so is a bucket, which it fits in.
# Each rank has two microbatches or more.
MODEL = (
    "model.num_layers=12",
    "model.hidden_size=256",
    "model.ffn_hidden_size=704",
    "zero.bucket_size=400_000",
    "train.micro_batch_size=1",
)
PRECISIONS = {
    "fp32": ("train.precision=fp32",),
    "bf16": ("train.precision=bf16",),
    "bf16, bf16 gradients": ("train.precision=bf16", "train.gradient_accumulation=bf16"),
}
BATCH_OF_4 = "train.global_batch_size=4"
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
# Name: (ranks, overrides, stages), in fp32 and bf16
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[int, ...]]] = {
    "TP2 DP2": (4, (TENSOR,), (1, 3)),
    "PP2 DP2": (4, (PIPELINE,), (1, 3)),
    "TP2 PP2": (4, (TENSOR, PIPELINE), (1, 3)),
    "DP2, persistence threshold 256": (2, ("zero.persistence_threshold=256",), (3,)),
    "DP2, offload": (2, ("zero.offload_optimizer=true",), (1, 2, 3)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One job. stage: of ZeRO."""

    layout: str
    world_size: int
    precision: str
    stage: int
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes on the rank of a pipeline stage that holds most. parameters: of the rank, before ZeRO partitions.

    paper: weights, gradients and optimizer states. buckets: not part of the others.
    """

    layout: str
    precision: str
    zero_stage: int
    pipeline_stage: int
    parameters: int
    measured: dict[str, int]
    predicted: dict[str, int]
    paper: tuple[float, float, float]
    buckets: int
    unknown: dict[str, int]
    overrides: tuple[str, ...]


def cases() -> Iterator[Case]:
    for dp_size in (1, 2, 4):
        batch = f"train.global_batch_size={2 * dp_size}"
        for precision, overrides in PRECISIONS.items():
            for stage in range(4):
                yield Case(
                    f"DP{dp_size}",
                    dp_size,
                    precision,
                    stage,
                    (*MODEL, *overrides, batch, f"zero.stage={stage}"),
                )
    for layout, (world_size, more, stages) in LAYOUTS.items():
        for precision in ("fp32", "bf16"):
            for stage in stages:
                overrides = (*MODEL, *more, *PRECISIONS[precision], BATCH_OF_4, f"zero.stage={stage}")
                yield Case(layout, world_size, precision, stage, overrides)


def measure(selected: Sequence[Case]) -> list[Row]:
    """The rows of all cases, in their order; one start of the ranks for each world size."""
    rows: dict[Case, list[Row]] = {}
    for world_size in sorted({case.world_size for case in selected}):
        together = [case for case in selected if case.world_size == world_size]
        jobs = [case.overrides for case in together]
        ranks = run_ranks(world_size, compare, jobs, VOCAB_SIZE, deadline_seconds=60 + 30 * len(jobs))
        for case, comparisons in zip(together, zip(*ranks, strict=True), strict=True):
            rows[case] = list(_rows(case, comparisons))
    return [row for case in selected for row in rows[case]]


def _rows(case: Case, comparisons: Sequence[Comparison]) -> Iterator[Row]:
    for stage in sorted({c.coordinates.pipeline for c in comparisons}):
        ranks = [c for c in comparisons if c.coordinates.pipeline == stage]
        first = ranks[0]
        yield Row(
            layout=case.layout,
            precision=case.precision,
            zero_stage=case.stage,
            pipeline_stage=stage,
            parameters=first.numel,
            measured={kind: max(getattr(c.measured, kind) for c in ranks) for kind in KINDS},
            predicted=first.predicted,
            paper=paper_bytes(case.precision, case.stage, first.data_parallel, first.numel),
            buckets=max(c.measured.buffers for c in ranks),
            unknown={name: nbytes for c in ranks for name, nbytes in (c.measured.unknown or {}).items()},
            overrides=case.overrides,
        )


def paper_bytes(precision: str, stage: int, dp_size: int, parameters: int) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states."""
    weight, gradient, states = (4, 4, 8) if precision == "fp32" else (2, 2, 12)
    return (
        weight * parameters / (dp_size if stage == 3 else 1),
        gradient * parameters / (dp_size if stage >= 2 else 1),
        states * parameters / (dp_size if stage >= 1 else 1),
    )


def worst_difference(row: Row) -> float:
    """Largest relative difference of measured from predicted over all kinds of memory."""
    differences = [
        row.measured[kind] / row.predicted[kind] - 1
        if row.predicted[kind]
        else float(bool(row.measured[kind]))
        for kind in KINDS
    ]
    return max(differences, key=abs)


def table(rows: Sequence[Row]) -> str:
    """Markdown, in bytes per parameter: measured (predicted)."""
    heads = ["layout", "precision", "ZeRO", "weights", "gradients", "at the update", "states", "host"]
    lines = [
        "| " + " | ".join([*heads, "worst difference", "paper", "buckets"]) + " |",
        "|-|-|" + "-:|" * (len(heads) + 1),
    ]
    several = {row.layout for row in rows if row.pipeline_stage > 0}
    for row in rows:
        layout = row.layout + (f", stage {row.pipeline_stage}" if row.layout in several else "")
        cells = [_cell(row, kind) for kind in KINDS]
        paper = " + ".join(f"{nbytes / row.parameters:.3g}" for nbytes in row.paper)
        ends = [f"{worst_difference(row):+.1%}", paper, f"{row.buckets / row.parameters:.2f}"]
        lines.append("| " + " | ".join([layout, row.precision, str(row.zero_stage), *cells, *ends]) + " |")
    return "\n".join(lines)


def _cell(row: Row, kind: str) -> str:
    measured, predicted = row.measured[kind], row.predicted[kind]
    if not measured and not predicted:
        return "-"
    return f"{measured / row.parameters:.3f} ({predicted / row.parameters:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "results" / f"memory_cpu_{datetime.now(UTC):%Y-%m-%d}.json"
    parser.add_argument("--json", type=Path, default=default)
    arguments = parser.parse_args()
    quiet.silence()
    rows = measure(list(cases()))
    print(table(rows))
    for row in rows:
        for name, nbytes in row.unknown.items():
            where = f"{row.layout} {row.precision} ZeRO-{row.zero_stage}"
            print(f"{where}: not accounted for: {name}: {nbytes:,} bytes")
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

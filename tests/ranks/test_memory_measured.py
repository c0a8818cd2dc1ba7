"""What ranks really allocate is what the planner says, for each ZeRO stage and precision.

Within 3%, the padding of partitions being part of the prediction. One thing besides is stated, not predicted:
stage 1 reduces through a bucket, which spares up to a bucket of the gradients at the update.
"""

from __future__ import annotations

import pytest
from allocated import KINDS, Comparison, compare
from harness import run_ranks

VOCAB_SIZE = 300
BUCKET = 200_000
# 1.1 million parameters, of which the largest fits into the bucket; two microbatches on each rank.
MODEL = (
    "model.num_layers=6",
    "model.hidden_size=128",
    "model.ffn_hidden_size=352",
    f"zero.bucket_size={BUCKET}",
    "train.micro_batch_size=1",
)
TOLERANCE = 0.03
STAGES: list[tuple[str, ...]] = [(f"zero.stage={stage}",) for stage in range(4)]
LAYOUTS: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
    "DP2": (("train.global_batch_size=4",), STAGES),
    "DP2, one microbatch": (("train.global_batch_size=2",), STAGES[1:3]),
    "DP2, persistent parameters": (
        ("train.global_batch_size=4", "zero.persistence_threshold=128"),
        STAGES[3:],
    ),
    "DP2, offload": (("train.global_batch_size=4", "zero.offload_optimizer=true"), STAGES[1:]),
    "TP2": (("train.global_batch_size=2", "parallel.tensor=2"), [STAGES[1], STAGES[3]]),
    "PP2": (("train.global_batch_size=2", "parallel.pipeline=2"), [STAGES[1], STAGES[3]]),
}


def check(layout: str, precision: str) -> None:
    common, stages = LAYOUTS[layout]
    cases = [(*MODEL, *common, f"train.precision={precision}", *stage) for stage in stages]
    ranks = run_ranks(2, compare, cases, VOCAB_SIZE, deadline_seconds=240)
    for case, comparisons in zip(cases, zip(*ranks, strict=True), strict=True):
        what = f"{layout}, {' '.join(case[-2:])}"
        for pipeline_rank in {c.coordinates.pipeline for c in comparisons}:
            check_stage([c for c in comparisons if c.coordinates.pipeline == pipeline_rank], what)


def check_stage(comparisons: list[Comparison], what: str) -> None:
    """The prediction is for the rank that holds most."""
    for kind in KINDS:
        measured = max(getattr(c.measured, kind) for c in comparisons)
        predicted = comparisons[0].predicted[kind]
        spared = 4 * BUCKET if kind == "update_gradients" and "zero.stage=1" in what else 0
        assert predicted * (1 - TOLERANCE) - spared <= measured <= predicted * (1 + TOLERANCE), (
            f"{what}: {kind}: {measured:,} bytes measured, {predicted:,} predicted"
        )
    for comparison in comparisons:
        assert comparison.measured.unknown == {}, f"{what}: memory that nobody accounts for"


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_measured_is_what_was_predicted(layout: str, precision: str) -> None:
    check(layout, precision)


def test_a_wrong_prediction_is_seen() -> None:
    """The paper's 2 bytes of gradients per bf16 parameter are not what is kept: they are summed in fp32."""
    case = (*MODEL, "train.global_batch_size=4", "train.precision=bf16", "zero.stage=1")
    comparisons = [c for (c,) in run_ranks(2, compare, [case], VOCAB_SIZE)]
    for comparison in comparisons:
        comparison.predicted["gradients"] = 2 * comparison.numel
    with pytest.raises(AssertionError, match=r"gradients: .* bytes measured"):
        check_stage(comparisons, "stage 1")

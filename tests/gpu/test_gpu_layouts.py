"""Every layout on GPUs trains the model that one GPU trains: the cases of tests/ranks, with NCCL.

Matrices of another shape are multiplied by other kernels, and the embedding's gradients are added in no fixed
order: ten times the tolerances of gloo's ranks (jobs.assert_traces_equal).
"""

from __future__ import annotations

import jobs
import pytest
from harness import run_ranks

pytestmark = pytest.mark.gpu(2)
SLACK = 10
TIED = "model.tie_embeddings=true"
LAYOUTS = {
    "DP2": (2, ()),
    "TP2": (2, ("parallel.tensor=2",)),
    "TP2+SP": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "PP2": (2, ("parallel.pipeline=2",)),
    "PP2 interleaved": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "DP2xTP2+SP": (4, ("parallel.tensor=2", "parallel.sequence=true")),
    "DP2xPP2": (4, ("parallel.pipeline=2",)),
    "TP2+SP x PP2 interleaved": (
        4,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    ),
    "PP4": (4, ("parallel.pipeline=4",)),
    "DP2xTP2xPP2": (8, ("parallel.tensor=2", "parallel.pipeline=2")),
}


def single_gpu(*overrides: str) -> jobs.Trace:
    (trace,) = run_ranks(1, jobs.train_cases, [("zero.stage=0", *overrides)], on_gpus=True)[0]
    return trace


@pytest.fixture(scope="module")
def reference() -> jobs.Trace:
    return single_gpu(TIED)


def check(
    world_size: int, layout: tuple[str, ...], reference: jobs.Trace, stages: tuple[int, ...] = (0, 1, 2, 3)
) -> None:
    cases = [(f"zero.stage={stage}", *layout, TIED) for stage in stages]
    for traces in run_ranks(world_size, jobs.train_cases, cases, deadline_seconds=300, on_gpus=True):
        for case, trace in zip(cases, traces, strict=True):
            jobs.assert_traces_equal(trace, reference, f"{world_size} GPUs, {' '.join(case)}", SLACK)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.gpu(world_size)) for name, (world_size, _) in LAYOUTS.items()],
)
def test_every_stage_equals_one_gpu(name: str, reference: jobs.Trace) -> None:
    check(*LAYOUTS[name], reference)


@pytest.mark.parametrize("layout", [(), ("parallel.pipeline=2",)])
def test_reduction_overlaps_backward_passes(layout: tuple[str, ...], reference: jobs.Trace) -> None:
    check(2, ("zero.overlap_comm=true", "zero.bucket_size=3000", *layout), reference)


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",)])
def test_optimizer_states_in_host_memory(layout: tuple[str, ...], reference: jobs.Trace) -> None:
    check(2, ("zero.offload_optimizer=true", *layout), reference, stages=(1, 2, 3))


@pytest.mark.parametrize("name", ["DP2", "TP2+SP", "PP2 interleaved"])
def test_bf16_follows_one_gpu(name: str) -> None:
    """Tolerances of tests/ranks/test_layout_equality.py, for the same reasons."""
    bf16 = ("train.precision=bf16", TIED)
    reference = single_gpu(*bf16)
    world_size, layout = LAYOUTS[name]
    cases = [(f"zero.stage={stage}", *layout, *bf16) for stage in (0, 1, 2, 3)]
    for case, trace in zip(
        cases, run_ranks(world_size, jobs.train_cases, cases, on_gpus=True)[0], strict=True
    ):
        assert trace.losses == pytest.approx(reference.losses, rel=1e-3), case
        assert trace.grad_norms == pytest.approx(reference.grad_norms, rel=1e-2), case

"""What occupies a device beside states and activations, by hand."""

import math
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LLAMA_VOCABULARY, config_of, llama

from distllm.config.schema import Config
from distllm.layout.whole import WholeLimits, whole_limits
from distllm.plan import live as live_module
from distllm.plan.buckets import bucket_bytes, computed_gradient, sent_copies
from distllm.plan.libraries import (
    CONTEXT_BYTES,
    CUBLAS_BYTES,
    NCCL_CHANNEL_BYTES,
    communicator_bytes,
    context_bytes,
    num_communicators,
    num_neighbours,
)
from distllm.plan.live import gathered_parameters, live_parameters
from distllm.plan.memory import rank_memory
from distllm.plan.nearest import changed
from distllm.plan.rank_view import RankView
from distllm.plan.startup import start_bytes

ONE = ("model=llama3_8b", "train.micro_batch_size=1", "train.global_batch_size=64")
TABLE = LLAMA_VOCABULARY * 4096
FC1 = 2 * 14_336 * 4096  # gate and up
BUCKET = 50_000_000
SMALL = config_of("zero.stage=3", "zero.persistence_threshold=0", "world_size=4")


def view_of(*overrides: str, dp_size: int = 64, stage: int = 0) -> RankView:
    config = llama("llama3_8b", *ONE[1:], *overrides, f"world_size={dp_size}")
    return RankView.of(config, LLAMA_VOCABULARY, dp_size, stage)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("zero.stage=0",), 0),
        (("zero.stage=1",), 0),
        (("zero.stage=1", "train.precision=fp32", "zero.offload_optimizer=true"), 4 * BUCKET),
        (("zero.stage=2",), 2 * BUCKET),
        (("zero.stage=2", "zero.overlap_comm=true"), 2 * 2 * BUCKET),
        (("zero.stage=3",), 4 * BUCKET),
        (("zero.stage=3", "zero.bucket_size=1000000", "train.gradient_accumulation=bf16"), 2_000_000),
    ],
)
def test_buckets_are_deepspeed_s(overrides: tuple[str, ...], expected: int) -> None:
    assert bucket_bytes(view_of(*overrides)) == expected


def test_stage_3_sends_a_gradient_larger_than_a_bucket_whole() -> None:
    """The table is cast to fp32 and sent alone: 64 ranks divide it, so it need not be copied again."""
    assert sent_copies(view_of("zero.stage=3")) == 4 * TABLE
    assert computed_gradient(view_of("zero.stage=3")) == 2 * TABLE
    # 63 ranks do not divide it: padded, and so copied.
    assert sent_copies(view_of("zero.stage=3", "train.global_batch_size=63", dp_size=63)) == 8 * TABLE
    assert sent_copies(view_of("zero.stage=3", dp_size=1)) == 0


def test_stage_2_sends_what_one_rank_owns_of_a_large_gradient() -> None:
    """A part is 8.03e9 / 64 = 125 million elements, joined with at most a bucket's; in bf16, cast to fp32."""
    part = 8_030_261_248 / 64
    assert 6 * part < sent_copies(view_of("zero.stage=2")) < 6 * (part + BUCKET) < 6 * TABLE


def test_stage_1_sends_what_it_keeps() -> None:
    assert sent_copies(view_of("zero.stage=1")) == 0
    assert computed_gradient(view_of("zero.stage=1")) == 2 * FC1


def test_a_cpu_has_neither_context_nor_communicators() -> None:
    for cluster in ("none", "cpu"):
        view = view_of(f"cluster={cluster}")
        assert context_bytes(view.config) == communicator_bytes(view) == 0
    view = view_of("cluster=b200")
    assert context_bytes(view.config) == CONTEXT_BYTES + CUBLAS_BYTES
    assert communicator_bytes(view) == 2 * 24 * 2 * NCCL_CHANNEL_BYTES  # world and data


def test_communicators_are_those_of_the_groups() -> None:
    view = view_of("parallel.tensor=2", "parallel.pipeline=4", dp_size=8)
    assert num_communicators(view) == 5  # world, data, tensor, pipeline, model; Llama ties no embedding
    deep = view_of("parallel.pipeline=4", dp_size=16).config
    views = [RankView.of(deep, LLAMA_VOCABULARY, 4, stage) for stage in range(4)]
    assert [num_neighbours(view) for view in views] == [1, 2, 2, 1]
    interleaved = changed(deep, {"parallel.virtual_pipeline": 2})
    assert num_neighbours(RankView.of(interleaved, LLAMA_VOCABULARY, 4, 0)) == 2  # the last stage's, too
    tied = config_of("parallel.pipeline=2", "model.tie_embeddings=true", "world_size=2")
    assert num_communicators(RankView.of(tied, 300, 1, 0)) == 4  # world, pipeline, model, embedding
    assert num_communicators(RankView.of(config_of("world_size=1"), 300, 1, 0)) == 0


def small_view(**changes: object) -> RankView:
    return RankView.of(changed(SMALL, dict(changes)), 300, 4, 0)


def test_without_limits_what_is_gathered_stays() -> None:
    """As `gathered_parameters` says, whose bytes are compared with those of real steps: once per step."""
    view, limits = small_view(), WholeLimits(10**12, 10**12)
    held = live_parameters(view, limits).held
    assert held == sum(gathered_parameters(view, 1, limits)) == view.held.numel


def test_two_of_the_largest_layers_and_a_bucket_are_whole() -> None:
    """Above the limit is at most one parameter that begins below it; persistent ones are not counted."""
    view = view_of("zero.stage=3")
    limits = whole_limits({name: math.prod(shape) for name, shape in view.held.shapes.items()}, BUCKET)
    assert limits == WholeLimits(2 * TABLE, 2 * TABLE + BUCKET)  # larger than a layer
    live = live_parameters(view)
    assert TABLE <= live.held <= limits.live + TABLE
    assert BUCKET <= live.gathered <= BUCKET + TABLE


@settings(deadline=None, max_examples=25)
@given(
    bucket=st.integers(1, 4_000_000),
    live=st.integers(0, 4_000_000),
    reuse=st.integers(0, 4_000_000),
    granularity=st.sampled_from(["none", "full"]),
)
def test_a_bound_on_live_parameters_is_kept(bucket: int, live: int, reuse: int, granularity: str) -> None:
    """Above it are at most a module, the end of what is prefetched, and what is kept for reuse."""
    view = small_view(**{"zero.bucket_size": bucket, "recompute.granularity": granularity})
    largest = max(map(math.prod, view.held.shapes.values()))
    found = live_parameters(view, WholeLimits(reuse, live))
    assert largest <= found.held <= min(view.held.numel, live + reuse + 2 * largest)
    assert found.gathered <= found.held


@settings(deadline=None, max_examples=15)
@given(
    bucket=st.sampled_from([1000, 100_000, 10_000_000]),
    reuse=st.sampled_from([0, 100_000, 10**9]),
    pipeline=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    tied=st.booleans(),
)
def test_microbatches_that_repeat_are_counted_as_if_followed(
    bucket: int, reuse: int, pipeline: tuple[int, int], tied: bool
) -> None:
    depth, chunks = pipeline
    view = small_view(
        **{
            "zero.bucket_size": bucket,
            "parallel.pipeline": depth,
            "parallel.virtual_pipeline": chunks,
            "model.tie_embeddings": tied,
        }
    )
    limits = WholeLimits(reuse, reuse + bucket)
    followed = live_module.follow_gathers(view, 24, limits)
    assert Counter(gathered_parameters(view, 24, limits)) == followed


def test_the_start_holds_the_share_and_one_whole_parameter() -> None:
    view = view_of("zero.stage=3")
    weights = 2 * 8_030_261_248 // 64
    table = 2 * TABLE
    assert start_bytes(view.config, view.held, 64, weights, 0) == weights + table
    at_1 = view_of("zero.stage=1")
    weights = 2 * 8_030_261_248
    # Weights move into flat buckets one by one, of which the table's is the largest.
    assert start_bytes(at_1.config, at_1.held, 64, weights, 0) == weights + table


def rest(config: Config) -> dict[str, int]:
    memory = rank_memory(RankView.of(config, LLAMA_VOCABULARY, 64, 0))
    return memory.on_device


@pytest.mark.parametrize("stage", range(4))
def test_without_a_device_the_account_is_the_one_before(stage: int) -> None:
    overrides = (*ONE[1:], f"zero.stage={stage}", "world_size=64")
    without = rest(llama("llama3_8b", *overrides))
    assert list(without) == [
        "weights",
        "gradients",
        "optimizer states",
        "activations",
        "loss",
        "update copies",
    ]
    here = rest(llama("llama3_8b", *overrides, "cluster=b200", "cluster.memory_gib=1000"))
    del without["update copies"]  # on a device the copies of messages come on top
    assert without == {kind: here[kind] for kind in without}
    assert len(here) == len(without) + 9


def test_on_a_cpu_only_libraries_are_left_out() -> None:
    overrides = (*ONE[1:], "zero.stage=3", "world_size=64")
    gpu, cpu = (
        rank_memory(RankView.of(llama("llama3_8b", *overrides, f"cluster={name}"), LLAMA_VOCABULARY, 64, 0))
        for name in ("b200", "cpu")
    )
    assert gpu.occupied
    assert cpu.occupied
    assert asdict(gpu.occupied) | {"context": 0, "communicators": 0} == asdict(cpu.occupied)
    assert gpu.total - cpu.total == gpu.occupied.always > 0


def test_the_workspace_of_the_loss_is_that_of_a_chunk() -> None:
    memory = rank_memory(view_of("cluster=b200"))
    assert memory.occupied
    assert memory.occupied.loss_workspace == 1024 * 4096 * (4 + 2)

"""What a step really sends is what plan/communication.py predicts: every call and every byte, on every rank.

Only the calls of stage 3's all-gathers are bounded instead: DeepSpeed joins gathers of several parameters by
the order in which modules without parameters run, so there are at most as many calls as gathered parameters,
and at least one for each bucket and the largest parameter on top. Their bytes are exact too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jobs
import pytest
from harness import run_ranks

from distllm.layout.grid import Coordinates
from distllm.layout.traffic import Amount, Transfer
from distllm.plan.communication import rank_traffic
from distllm.plan.gradients import BYTES
from distllm.plan.rank_view import RankView
from distllm.runtime.collective_counter import CollectiveCounter

TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
INTERLEAVED = "parallel.virtual_pipeline=2"
TIED, BF16 = "model.tie_embeddings=true", "train.precision=bf16"
SMALL_BATCH = "train.global_batch_size=8"
# Name: (ranks, overrides)
LONG = pytest.mark.long
LAYOUTS = {
    "DP2": (2, ()),
    "DP4": (4, ()),
    "TP2": (2, (TP,)),
    "TP2+SP": (2, (TP, SP)),
    "PP2": (2, (PP,)),
    "PP2 interleaved": (2, (PP, INTERLEAVED)),
    "DP2xTP2+SP": (4, (TP, SP)),
    "DP2xPP2": (4, (PP,)),
    "PP4": (4, ("parallel.pipeline=4",)),
    "DP2xPP2 interleaved": (4, (PP, INTERLEAVED)),
    "TP2xPP2xDP2": (8, (TP, PP)),
}
GATHER = Transfer("data", "all_gather")


@dataclass(frozen=True)
class Comparison:
    """least_gathers: fewest calls in which stage 3 can gather what it does."""

    coordinates: Coordinates
    counted: dict[Transfer, Amount]
    predicted: dict[Transfer, Amount]
    least_gathers: float


def compare(rank: int, cases: list[tuple[str, ...]], has_weights: bool = False) -> list[Comparison]:
    """What this rank sends in a step of each case: in the second one of stage 3, which differs from its first
    (while it records the order of modules), and in the first of others."""
    found = []
    for overrides in cases:
        config = jobs.make_config(*overrides)
        engine = jobs.build_engine(config)
        grid, place = engine.groups.grid, engine.groups.coordinates
        for step in range(2 if config.zero.stage == 3 else 1):
            batch = jobs.microbatches(step, config, engine.groups)
            if has_weights:
                batch = [replace(b, loss_weights=jobs.even_weights(b.labels)) for b in batch]
            with CollectiveCounter(engine.groups) as counter:
                engine.train_step(batch, config.optimizer.lr)
        predicted = rank_traffic(RankView(config, jobs.VOCAB_SIZE, grid, place.pipeline), has_weights)
        largest = max(math.prod(p.local_shape) for p in engine.places.values())
        gathered = predicted.get(GATHER, Amount(0, 0)).bytes / BYTES[config.train.precision]
        least = gathered / (config.zero.bucket_size + largest)
        found.append(Comparison(place, dict(counter.traffic()), predicted, least))
        jobs.finish(engine)
    return found


def check(world_size: int, cases: list[tuple[str, ...]], *args: Any) -> None:
    for results in run_ranks(world_size, compare, cases, *args, deadline_seconds=300):
        for case, found in zip(cases, results, strict=True):
            counted, predicted = dict(found.counted), dict(found.predicted)
            if "zero.stage=3" in case and GATHER in predicted:
                calls, most = counted[GATHER].calls, predicted[GATHER].calls
                assert found.least_gathers <= calls <= most, (case, found.coordinates)
                counted[GATHER] = Amount(most, counted[GATHER].bytes)
            assert counted == predicted, (case, found.coordinates)


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Of four and more ranks; those whose axes are also in smaller layouts wait for the night."""
    is_repeated = name in ("PP4", "DP2xPP2 interleaved", "TP2xPP2xDP2")
    return [LONG, *([pytest.mark.nightly] if is_repeated else [])] if LAYOUTS[name][0] > 2 else []


@pytest.mark.parametrize("several", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in LAYOUTS])
def test_every_call_and_byte_is_predicted(name: str, several: str) -> None:
    """Each stage with two microbatches (or four) in one precision and, where the schedule allows it, one
    microbatch in the other; the other way round at night."""
    world_size, layout = LAYOUTS[name]
    degree = 2 ** sum(o in layout for o in (TP, PP)) * (4 if name == "PP4" else 1)
    dp_size = world_size // degree
    one = "bf16" if several == "fp32" else "fp32"
    cases = [
        (
            f"zero.stage={stage}",
            f"train.precision={precision}",
            f"train.micro_batch_size={8 // dp_size // number}",
            *layout,
            SMALL_BATCH,
        )
        for stage in (0, 1, 2, 3)
        for precision, number in ((several, 2), (one, 1))
        if not (number == 1 and INTERLEAVED in layout)
    ]
    check(world_size, cases)


STAGES = [f"zero.stage={stage}" for stage in (0, 1, 2, 3)]


@LONG
def test_one_copy_of_a_tied_embedding_on_each_end_of_a_pipeline() -> None:
    check(
        4, [(stage, precision, PP, TIED) for stage in STAGES for precision in ("train.precision=fp32", BF16)]
    )


def test_learned_positions_biases_and_layer_norms() -> None:
    check(
        4,
        [(stage, *jobs.SMALL_GPT2, TP, *sequence) for stage in STAGES for sequence in ((), (SP,))],
    )


@LONG
def test_recomputed_layers_repeat_their_way_forward() -> None:
    again = [("recompute=full",), ("recompute=full", "recompute.num_layers=1"), ("recompute=selective",)]
    check(2, [(TP, *how, *sequence) for how in again for sequence in ((), (SP,))])
    check(4, [("zero.stage=3", PP, *how) for how in again])


def test_other_ways_of_zero() -> None:
    ways = ("zero.overlap_comm=true", "zero.offload_optimizer=true", "zero.persistence_threshold=500")
    check(2, [(stage, way) for stage in STAGES[1:] for way in ways])
    check(2, [(STAGES[0], "zero.overlap_comm=true", "zero.bucket_size=3000")])
    check(2, [(stage, BF16, "zero.offload_optimizer=true") for stage in STAGES[1:]])
    check(2, [(stage, BF16, "train.gradient_accumulation=bf16") for stage in STAGES])


def test_parts_that_need_padding_and_parameters_above_a_bucket() -> None:
    batch = ("train.global_batch_size=6", "train.micro_batch_size=1")
    check(3, [(stage, *batch, "zero.bucket_size=3000") for stage in STAGES])


def test_weights_of_tokens_are_summed() -> None:
    check(2, [("zero.stage=0",)], True)


def test_what_is_not_predicted_is_seen() -> None:
    """The comparison can fail: a batch of another size sends as many calls, but not as many bytes."""
    (found,) = run_ranks(2, compare, [(TP, "zero.stage=0")])[0]
    config = jobs.make_config("zero.stage=0", "model.seq_length=16")
    config = replace(config, parallel=replace(config.parallel, tensor=2))
    other = rank_traffic(RankView.of(config, jobs.VOCAB_SIZE, 1, 0), has_weights=False)
    everything = Transfer("tensor", "all_reduce")
    assert found.counted == found.predicted
    assert other[everything].calls == found.counted[everything].calls
    assert other[everything].bytes * 2 == found.counted[everything].bytes


def compare_unfixed(rank: int, fix: str, cases: list[tuple[str, ...]]) -> list[Comparison]:
    with mock.patch(f"distllm.engine.zero.{fix}", return_value=None):
        return compare(rank, cases)


@pytest.mark.parametrize("fix", ["unhook_modules_without_parameters", "whole_limits"])
def test_what_stage_3_gathers_rests_on_the_adapter(fix: str) -> None:
    """With hooks on every module it prefetches elsewhere, without limits it keeps all of a small model."""
    (found,) = run_ranks(
        4, compare_unfixed, fix, [("zero.stage=3", PP, SMALL_BATCH, "train.micro_batch_size=4")]
    )[0]
    assert found.counted[GATHER].bytes != found.predicted[GATHER].bytes

"""What a step really sends is what plan/communication.py predicts: every call and every byte, on every rank.

Only the calls of stage 3's all-gathers are bounded instead: DeepSpeed joins gathers of several parameters by
the order in which modules without parameters run, so there are at most as many calls as gathered parameters,
and at least one for each bucket and the largest parameter on top. Their bytes are exact too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jobs
import pytest
from harness import run_ranks

from distllm.layout.grid import Coordinates
from distllm.layout.traffic import Amount, Transfer
from distllm.plan.communication import rank_traffic
from distllm.plan.gradients import BYTES
from distllm.runtime.traffic import TrafficCounter

TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
INTERLEAVED = "parallel.virtual_pipeline=2"
TIED, BF16 = "model.tie_embeddings=true", "train.precision=bf16"
SMALL_BATCH = "train.global_batch_size=8"
GPT2 = (
    "model=gpt2_124m",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.seq_length=32",
)
# Name: (ranks, overrides)
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
                batch = [replace(b, weights=jobs.even_weights(b.labels)) for b in batch]
            with TrafficCounter(engine.groups) as counter:
                engine.train_step(batch, config.optimizer.lr)
        predicted = rank_traffic(config, jobs.VOCAB_SIZE, grid.data, place.pipeline, has_weights)
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_call_and_byte_is_predicted(name: str) -> None:
    """Each stage in fp32 and bf16, with two microbatches (or four) and, where the schedule allows it, one."""
    world_size, layout = LAYOUTS[name]
    degree = 2 ** sum(o in layout for o in (TP, PP)) * (4 if name == "PP4" else 1)
    dp_size = world_size // degree
    cases = [
        (f"zero.stage={stage}", precision, f"train.micro_batch_size={8 // dp_size // number}", *layout, SMALL_BATCH)
        for stage in (0, 1, 2, 3)
        for precision in ("train.precision=fp32", BF16)
        for number in (1, 2)
        if not (number == 1 and INTERLEAVED in layout)
    ]
    check(world_size, cases)

"""The phases of a step make up the step, under every layout."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Any

import jobs
import pytest
from harness import run_ranks

from distllm.engine import phases
from distllm.metrics import goodput

STEPS = 6
PIPELINE = ("parallel.pipeline=2", "train.micro_batch_size=2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ("zero.stage=0",)),
    "dp2 z1": (2, ("zero.stage=1",)),
    "dp2 z2": (2, ("zero.stage=2",)),
    "dp2 z3": (2, ("zero.stage=3",)),
    "tp2": (2, ("parallel.tensor=2",)),
    "pp2": (2, PIPELINE),
    "pp2 z2 interleaved": (2, (*PIPELINE, "parallel.virtual_pipeline=2", "zero.stage=2")),
}


def timed_steps(rank: int, overrides: tuple[str, ...]) -> tuple[list[float], list[dict[str, float]], Any]:
    """(seconds of each step, its phases, how often each of Megatron's timers was started in the last one)."""
    config = jobs.make_config("train.micro_batch_size=2", *overrides, "model.hidden_size=128")
    engine = jobs.build_engine(config)
    steps, found, started = [], [], Counter[str]()
    watched: Any = engine.phases
    timers = watched.megatron_timers

    def counting(name: str, **keywords: Any) -> Any:
        started[name] += "log_level" in keywords  # given at the start only
        return timers(name, **keywords)

    watched.megatron_timers = counting
    for step in range(STEPS):
        batch = jobs.microbatches(step, config, engine.groups)
        started.clear()
        began = time.perf_counter()
        engine.train_step(batch, config.optimizer.lr)
        steps.append(time.perf_counter() - began)
        found.append(engine.phases.end_step().seconds())
    engine.evaluate(batch)
    assert engine.phases.end_step().seconds() == {}, "a validation is no part of a step"
    jobs.finish(engine)
    return steps, found, started


@pytest.mark.parametrize("layout", LAYOUTS)
def test_phases_add_up_to_the_step(layout: str) -> None:
    """Phases never overlap, so they are at most the step; between them is the Python of the schedule, of some
    3% here and less for any larger model. At least 85% of the median step: a rank that loses its core to
    another process does so between two phases, too."""
    num_ranks, settings = LAYOUTS[layout]
    for seconds, found, started in run_ranks(num_ranks, timed_steps, settings):
        shares = [sum(of_step.values()) / step for step, of_step in zip(seconds, found, strict=True)]
        assert max(shares) <= 1, shares
        assert statistics.median(shares) > 0.85, shares
        names = {"forward", "backward", "optimizer"} | ({"pipeline_wait"} if "pp2" in layout else set())
        assert all(of_step.keys() == names for of_step in found)
        assert all(min(of_step.values()) > 0 for of_step in found)
        num_microbatches = 16 // 2 // (2 if "dp2" in layout else 1)
        passes = num_microbatches * (2 if "interleaved" in layout else 1)
        assert started["forward-compute"] == started["backward-compute"] == passes, started


def test_the_report_knows_every_phase() -> None:
    assert goodput.PHASES == phases.PHASES

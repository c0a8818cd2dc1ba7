"""What the verdict knows of gradients that the norm does not count."""

from __future__ import annotations

import math

import jobs
import torch
from harness import run_ranks


def step_with_a_broken_replica(rank: int, stage: int) -> tuple[bool, bool, bool]:
    """(whether the step happened, its norm is a number, any weight moved); rank 1 alone has NaN
    in the gradient of a norm's weight, of which the tensor-parallel rank 0 is the one that counts."""
    config = jobs.make_config("parallel.tensor=2", f"zero.stage={stage}", "train.precision=bf16")
    engine = jobs.build_engine(config)
    engine.train_step(jobs.microbatches(0, config, engine.groups), config.optimizer.lr)
    before = jobs.gather_weights(engine)
    parameter = next(p for p, place in engine.places.items() if "layernorm" in place.name)
    hook = parameter.register_hook(lambda g: g * math.nan if rank == 1 else g)
    result = engine.train_step(jobs.microbatches(1, config, engine.groups), config.optimizer.lr)
    hook.remove()
    after = jobs.gather_weights(engine)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    again = engine.train_step(jobs.microbatches(1, config, engine.groups), config.optimizer.lr)
    assert again.is_applied, "the gradients of the refused step are gone"
    jobs.finish(engine)
    return result.is_applied, math.isfinite(result.grad_norm), moved


def test_stage_2_in_bf16_refuses_for_a_replica_alone() -> None:
    """DeepSpeed looks at every gradient there, and so must what stands in for it (NormJudge)."""
    assert run_ranks(2, step_with_a_broken_replica, 2) == [(False, False, False)] * 2

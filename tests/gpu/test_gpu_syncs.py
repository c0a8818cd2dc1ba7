"""On a GPU: what waits for the device in a step, as PyTorch tells it, copies from the host included."""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import jobs
import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def world() -> Any:
    from distllm.runtime import dist

    runtime = dist.start(timedelta(seconds=60))
    yield runtime
    dist.stop(runtime, succeeded=True)


def build(config: Any, device: torch.device) -> Any:
    from distllm.layout.grid import Grid
    from distllm.layout.groups import create_groups
    from distllm.objectives import create_objective
    from distllm.trainer.build import build_engine

    groups = create_groups(Grid(), timedelta(seconds=60), 1)
    return build_engine(config, jobs.VOCAB_SIZE, groups, device, create_objective(config))


def on_device(step: int, config: Any, groups: Any, device: torch.device) -> Any:
    from distllm.engine.microbatch import Microbatch

    return [Microbatch(batch.tokens.to(device)) for batch in jobs.microbatches(step, config, groups)]


def waits_of_fourth_step(world: Any, stage: int, precision: str, size: int) -> list[str]:
    settings = (f"zero.stage={stage}", f"train.precision={precision}", f"train.micro_batch_size={size}")
    config = jobs.make_config(*settings)
    engine = build(config, world.device)
    for step in range(4):
        batch = on_device(step, config, engine.groups, world.device)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                engine.train_step(batch, config.optimizer.lr)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        engine.phases.end_step()
    jobs.finish(engine)
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_waits_once(stage: int, precision: str, world: Any) -> None:
    for size in (16, 4):  # one microbatch, and four
        places = waits_of_fourth_step(world, stage, precision, size)
        assert len(places) == 1, places
        assert "engine/engine.py" in places[0], places


def test_stage_3_waits_once_more_for_a_backward_pass(world: Any) -> None:
    """DeepSpeed's own: its reduction stream at the end of each backward pass, and a constant for the norm of
    each of the two parameter groups (zero/stage3.py, independent_gradient_partition_epilogue and
    get_grad_norm_direct). Nothing of ours grows with the microbatches."""
    for size, num_microbatches in ((16, 1), (4, 4)):
        places = waits_of_fourth_step(world, 3, "bf16", size)
        ours = [place for place in places if "/deepspeed/" not in place]
        assert len(ours) == 1, places
        assert len(places) <= 1 + 2 + num_microbatches, places


def test_phases_of_events_make_up_the_step(world: Any) -> None:
    """On the device, the host waiting at both ends: forward, backward and optimizer leave little else."""
    config = jobs.make_config("model.hidden_size=512", "model.seq_length=512", "train.micro_batch_size=8")
    engine = build(config, world.device)
    for step in range(5):
        batch = on_device(step, config, engine.groups, world.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        engine.train_step(batch, config.optimizer.lr)
        end.record()
        timings = engine.phases.end_step()
        torch.cuda.synchronize()
        assert timings.is_complete
    seconds, total = timings.seconds(), begin.elapsed_time(end) / 1000
    jobs.finish(engine)
    assert seconds.keys() == {"forward", "backward", "optimizer"}
    assert 0.8 * total < sum(seconds.values()) <= 1.01 * total

"""`distllm check` against the run time, over sampled configurations of the tiny model on up to 4 ranks.

What the rules call legal must start and do a step, with the loss of the single process. What they refuse must
fail when it is built all the same, or be on the list of what is refused by decision, each for its reason.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import jobs
import pytest
from by_day import DAY_AND_NIGHT
from harness import RanksFailedError, run_ranks

from distllm.config import rules
from distllm.config.schema import Config

SAMPLES_PER_WORLD_SIZE = {1: 40, 2: 80, 4: 120}
CASES_PER_START = 20
# Refused although Megatron and DeepSpeed would go on, each for its reason: settings that would be silently
# ignored, batches that are not shared out evenly, padding that the planner does not count on.
REFUSED_BY_DECISION = {
    "parallel.sequence",  # without tensor parallelism it does nothing
    "parallel.virtual_pipeline",  # without a pipeline it does nothing; a chunk without a layer idles
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "parallel.embedding_as_layer",
    "parallel.loss_as_layer",
    "parallel.pipeline",  # a stage without a layer: its ranks would wait for each other in ZeRO's collectives
    "recompute.num_layers",  # only full recompute reads it
    "zero.overlap_comm",  # offloaded stage 1 with interleaved chunks loses gradients, without any error
    "zero.offload_optimizer",  # stage 0 is not DeepSpeed's
    "train.gradient_accumulation",  # fp32 weights have no bf16 gradients
    "train.global_batch_size",  # samples would be left out
    "world size",  # ranks would be left over
}


# What a sample may have besides its degrees, stage, precision and ties: settings with some values for each.
EXTRAS: dict[str, list[Any]] = {
    "parallel.tensor": [2, 3, 4],
    "parallel.sequence": [True],
    "parallel.pipeline": [2, 3, 4],
    "parallel.virtual_pipeline": [2, 3],
    "parallel.first_stage_layers": [1, 2, 3],
    "parallel.last_stage_layers": [1, 2],
    "parallel.embedding_as_layer": [True],
    "parallel.loss_as_layer": [True],
    "model.num_layers": [2, 3, 6, 8],
    "model.num_query_groups": [1, 4],
    "zero.overlap_comm": [True],
    "zero.offload_optimizer": [True],
    "train.global_batch_size": [4, 6, 12],
    "train.micro_batch_size": [2, 3],
    "train.gradient_accumulation": ["bf16"],
    "recompute.granularity": ["selective", "full"],
    "recompute.num_layers": [1, 5],
}


def sample(generator: random.Random, world_size: int) -> Config:
    """A configuration of the tiny model for `world_size` ranks with up to three extras, legal or not."""
    degrees = [(t, p) for t in (1, 2, 4) for p in (1, 2, 4) if world_size % (t * p) == 0 and t < 4]
    tensor, pipeline = generator.choice(degrees)
    values: dict[str, Any] = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "zero.stage": generator.choice([0, 1, 2, 3]),
        "train.precision": generator.choice(["fp32", "fp32", "bf16"]),
        "train.global_batch_size": 8,
        "train.micro_batch_size": 1,
        "model.tie_embeddings": generator.choice([False, True]),
    }
    for setting in generator.sample(sorted(EXTRAS), generator.choice([0, 1, 2, 2, 3])):
        values[setting] = generator.choice(EXTRAS[setting])
    config = jobs.make_config()
    for setting, value in values.items():
        section, _, name = setting.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def first_losses(rank: int, configs: list[Config]) -> list[float]:
    """One step of each."""
    losses = []
    for config in configs:
        engine = jobs.build_engine(config)
        losses.append(jobs.train(engine, config, 1).losses[0])
        jobs.finish(engine)
    return losses


def single_process(config: Config) -> Config:
    """The same job without any parallelism."""
    base = jobs.make_config()
    return replace(
        config,
        parallel=base.parallel,
        recompute=base.recompute,
        zero=replace(base.zero, stage=0),
        train=replace(config.train, gradient_accumulation="fp32"),
    )


def drawn(world_size: int) -> list[Config]:
    generator = random.Random(world_size)
    return [sample(generator, world_size) for _ in range(SAMPLES_PER_WORLD_SIZE[world_size])]


@pytest.mark.long
@pytest.mark.parametrize("world_size", SAMPLES_PER_WORLD_SIZE)
@pytest.mark.parametrize("part", DAY_AND_NIGHT)
def test_legal_configurations_start_and_do_a_step(part: int, world_size: int) -> None:
    legal = [config for config in drawn(world_size) if not rules.check(config, world_size)]
    assert len(legal) >= SAMPLES_PER_WORLD_SIZE[world_size] // 5, "the samples must hold legal configurations"
    legal = legal[part::2]
    for begin in range(0, len(legal), CASES_PER_START):
        configs = legal[begin : begin + CASES_PER_START]
        losses = run_ranks(world_size, first_losses, configs, deadline_seconds=240)[0]
        (expected,) = run_ranks(1, first_losses, [single_process(config) for config in configs])
        for config, loss, reference in zip(configs, losses, expected, strict=True):
            # One forward pass: rounding of fp32 sums, of bf16 activations (2^-9 each, averaged over tokens).
            tolerance = 1e-5 if config.train.precision == "fp32" else 1e-3
            assert loss == pytest.approx(reference, rel=tolerance), config


@pytest.mark.parametrize("world_size", [2, 4])
def test_refused_configurations_are_impossible_or_refused_by_decision(world_size: int) -> None:
    impossible: dict[frozenset[str], tuple[Config, set[str]]] = {}
    for config in drawn(world_size):
        settings = {problem.setting for problem in rules.check(config, world_size)}
        if settings - REFUSED_BY_DECISION:
            impossible.setdefault(frozenset(settings - REFUSED_BY_DECISION), (config, settings))
    assert impossible, "the samples must hold impossible configurations"
    for config, settings in impossible.values():
        try:
            run_ranks(world_size, first_losses, [config], deadline_seconds=20)
        except RanksFailedError:
            continue
        pytest.fail(f"refused for {settings}, but it runs: {config}")

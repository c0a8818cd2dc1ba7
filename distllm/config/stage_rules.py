"""The rules of stages: what pipeline parallelism, chunks and recomputation require of the number of layers.

Those of Megatron Core 0.16.1 (`TransformerConfig.__post_init__`, `get_num_layers_to_build`), and two of ours:
settings that it would ignore raise an error, and so do chunks without a layer, which it builds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from distllm.config.problems import Problem
from distllm.config.schema import Config, Parallel
from distllm.config.stages import counted_layers_per_stage, even_share, layers_per_chunk


def uneven_settings_have_stages(config: Config, _: int) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.pipeline == 1:
        for name in ("first_stage_layers", "last_stage_layers", "embedding_as_layer", "loss_as_layer"):
            if value := getattr(parallel, name):
                empty = "false" if value is True else "null"
                rule = f"must be {empty} for parallel.pipeline=1: one stage holds all layers"
                yield Problem(f"parallel.{name}", value, rule, f"parallel.{name}={empty}")
    elif parallel.first_stage_layers or parallel.last_stage_layers:
        for name in ("embedding_as_layer", "loss_as_layer"):
            if getattr(parallel, name):
                rule = (
                    "must be false with first_stage_layers or last_stage_layers, which place layers outright"
                )
                yield Problem(f"parallel.{name}", True, rule, f"parallel.{name}=false")


def layers_fill_the_stages(config: Config, _: int) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.pipeline == 1 or _is_contradictory(parallel) or _layers_are_placed(config):
        return
    if parallel.last_stage_layers is not None:
        yield _uneven(config, "parallel.last_stage_layers", parallel.last_stage_layers)
    elif parallel.first_stage_layers is not None:
        yield _uneven(config, "parallel.first_stage_layers", parallel.first_stage_layers)
    else:
        yield _even(config)


def _uneven(config: Config, setting: str, value: int) -> Problem:
    """Report that the other stages cannot divide evenly what the first or last stage leaves."""
    shared, stages = even_share(config.model.num_layers, config.parallel)
    options = [n for n in range(1, shared + value + 1) if _share(shared + value - n, stages)]
    nearest = min(options, key=lambda n: abs(n - value), default=None)
    fix = f"{setting}={nearest}" if nearest else f"{setting}=null, or a smaller parallel.pipeline"
    rule = f"must leave the {stages} other stages a positive multiple of {stages} layers, leaves {shared}"
    if stages == 0:
        rule = f"must make model.num_layers={config.model.num_layers} together with the first stage's layers"
    return Problem(setting, value, rule, fix)


def _even(config: Config) -> Problem:
    """Report that the layers cannot be divided into equal stages."""
    parallel, num_layers = config.parallel, config.model.num_layers
    pipeline = parallel.pipeline
    shared, _ = even_share(num_layers, parallel)
    divisors = [n for n in range(1, shared + 1) if shared % n == 0]
    below, above = [n for n in divisors if n < pipeline], [n for n in divisors if n > pipeline]
    fix = " or ".join(f"parallel.pipeline={n}" for n in below[-1:] + above[:1])
    counts = {
        0: "parallel.embedding_as_layer=false parallel.loss_as_layer=false",
        1: "only one of parallel.embedding_as_layer and parallel.loss_as_layer",
        2: "parallel.embedding_as_layer=true parallel.loss_as_layer=true",
    }
    for extra, text in counts.items():
        if num_layers > pipeline and (num_layers + extra) % pipeline == 0:
            fix += f", or {text}"
    rule = f"must divide the {shared} layers"
    if shared > num_layers:
        rule += f", of which {shared - num_layers} stand for embedding or loss"
    return Problem("parallel.pipeline", pipeline, rule, fix)


def chunks_fill_the_stages(config: Config, _: int) -> Iterator[Problem]:
    parallel = config.parallel
    setting, chunks = "parallel.virtual_pipeline", parallel.virtual_pipeline
    if chunks > 1 and parallel.pipeline == 1:
        rule = "must be 1 for parallel.pipeline=1: chunks of several stages are interleaved"
        yield Problem(setting, chunks, rule, f"{setting}=1, or parallel.pipeline=2")
    if parallel.pipeline == 1 or not _layers_are_placed(config):
        return
    if chunks > 1 and parallel.pipeline == 2 and parallel.first_stage_layers and parallel.last_stage_layers:
        # get_transformer_layer_offset divides by the number of stages in between.
        rule = "cannot be interleaved when both of 2 stages have their layers set (Megatron Core 0.16.1)"
        yield Problem(
            setting,
            chunks,
            rule,
            "parallel.last_stage_layers=null: the last stage then gets the remaining layers",
        )
    counted = counted_layers_per_stage(config.model.num_layers, parallel)
    common = math.gcd(*counted)
    if common % chunks:
        nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - chunks))
        numbers = ", ".join(map(str, sorted(set(counted))))
        rule = f"must divide the layers of every stage: {numbers}"
        yield Problem(setting, chunks, rule, f"{setting}={nearest}")
    elif min(map(min, layers_per_chunk(config.model.num_layers, parallel))) < 1:
        name, value = (setting, chunks) if chunks > 1 else ("parallel.pipeline", parallel.pipeline)
        rule = "must leave every chunk a layer beside the embedding or the loss that counts as one"
        fix = "parallel.embedding_as_layer=false parallel.loss_as_layer=false, or fewer chunks"
        yield Problem(name, value, rule, fix)


def recomputed_layers_exist(config: Config, _: int) -> Iterator[Problem]:
    recompute = config.recompute
    if recompute.num_layers is None:
        return
    if recompute.granularity != "full":
        rule = f"must be null for recompute.granularity={recompute.granularity}"
        fix = "recompute.num_layers=null, or recompute.granularity=full"
        yield Problem("recompute.num_layers", recompute.num_layers, rule, fix)
    elif _layers_are_placed(config):
        largest = max(map(max, layers_per_chunk(config.model.num_layers, config.parallel)))
        if recompute.num_layers > largest:
            rule = f"must not be more than the {largest} layers that a stage or chunk has"
            fix = f"recompute.num_layers=null for all, or at most {largest}"
            yield Problem("recompute.num_layers", recompute.num_layers, rule, fix)


def _is_contradictory(parallel: Parallel) -> bool:
    """Return whether `uneven_settings_have_stages` reports the settings."""
    placed = parallel.first_stage_layers is not None or parallel.last_stage_layers is not None
    counted = parallel.embedding_as_layer or parallel.loss_as_layer
    return (placed and counted) or (parallel.pipeline == 1 and (placed or counted))


def _layers_are_placed(config: Config) -> bool:
    """Return whether every stage has a number of layers, before they are divided into chunks."""
    parallel = config.parallel
    return not _is_contradictory(parallel) and _share(*even_share(config.model.num_layers, parallel))


def _share(layers: int, stages: int) -> bool:
    """Return whether `stages` stages can hold `layers` layers, all as many and at least one."""
    return layers == 0 if stages == 0 else layers > 0 and layers % stages == 0

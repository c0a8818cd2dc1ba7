"""The parameters that ZeRO-3 gathers in a step, by the rules of DeepSpeed 0.19.8. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate

from distllm.config.stages import microbatch_group_size
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.plan.rank_view import RankView

# deepspeed/runtime/zero/config.py: stage3_max_reuse_distance.
MAX_REUSE_NUMEL = 1_000_000_000
Use = tuple[str, ...]  # the parameters of a module that runs, forward or backward


def gathered_parameters(
    view: RankView, num_microbatches: int, max_reuse_numel: int = MAX_REUSE_NUMEL
) -> list[int]:
    """Return the elements of every parameter that one rank gathers in a step, once for each gather.

    `PartitionedParameterCoordinator.__params_to_release`: a parameter stays after its module has run if it is
    used again before `max_reuse_numel` elements of others are. Prefetching keeps some that are used up to
    `zero.bucket_size` later. Embeddings, whose input has no gradient, are released after every backward pass
    (`release_backward_leftovers`), and so is the copy of a tied one on the last stage, which is no parameter
    of the module that uses it. Parameters up to `zero.persistence_threshold` are gathered once, after the
    update.
    """
    uses = list(module_uses(view, num_microbatches))
    sizes = {name: math.prod(shape) for name, shape in view.held.shapes.items()}
    threshold = view.config.zero.persistence_threshold
    before = [0, *accumulate(sum(sizes[name] for name in use) for use, _ in uses)]
    gathered = []
    last_use: dict[Use, tuple[int, bool]] = {}
    for position, (use, always_released) in enumerate(uses):
        last, was_released = last_use.get(use, (-1, True))
        if was_released or before[position] - before[last + 1] >= max_reuse_numel:
            gathered += [sizes[name] for name in use if sizes[name] > threshold]
        last_use[use] = position, always_released
    persistent = [size for size in sizes.values() if size <= threshold]
    return gathered + persistent


def passes(
    stage_index: int, pipeline: int, num_chunks: int, num_microbatches: int
) -> Iterator[tuple[int, bool]]:
    """Yield (chunk, whether forward) of every pass of a stage in a step.

    In the order of Megatron Core's 1F1B schedules (pipeline_parallel/schedules.py).
    """
    after = pipeline - stage_index - 1
    total = num_microbatches * num_chunks
    if num_chunks == 1:
        order, warm_up = [0] * num_microbatches, min(after, num_microbatches)
    else:
        group = microbatch_group_size(num_microbatches, pipeline)
        starts = range(0, num_microbatches, group)
        order = [
            c for s in starts for c in range(num_chunks) for _ in range(min(group, num_microbatches - s))
        ]
        warm_up = min(2 * after + (num_chunks - 1) * group, total)
    for position in range(total + warm_up):
        if position < total:
            yield order[position], True
        if position >= warm_up:
            yield num_chunks - 1 - order[position - warm_up], False


def module_uses(view: RankView, num_microbatches: int) -> Iterator[tuple[Use, bool]]:
    """Yield modules in the order in which they run, and whether the use always releases its parameters."""
    num_chunks = len(view.stage.chunks)
    forward, backward = {}, {}
    for chunk in range(num_chunks):
        units = _units(view, chunk)
        forward[chunk] = [(use, False) for unit in units for use in unit]
        backward[chunk] = [item for unit in reversed(units) for item in _backward(view, unit, chunk)]
    for chunk, is_forward in passes(view.stage_index, view.grid.pipeline, num_chunks, num_microbatches):
        yield from forward[chunk] if is_forward else backward[chunk]


def _backward(view: RankView, unit: list[Use], chunk: int) -> list[tuple[Use, bool]]:
    first, recompute = unit[0][0], view.config.recompute
    again: list[Use] = []
    if first.startswith("decoder.layers.") and recompute.granularity == "full":
        layer = int(first.split(".")[2])
        if recompute.num_layers is None or layer - view.stage.chunks[chunk][0] < recompute.num_layers:
            again = unit
    # A tied output projection releases its table on a stage without the embedding; on the same stage it may
    # keep it.
    always_released = first.startswith("embedding.") or not view.stage.is_first
    uses = [*again, *reversed(unit)]
    return [(use, always_released and use[0].startswith("embedding.")) for use in uses]


def _units(view: RankView, chunk: int) -> list[list[Use]]:
    """Return a chunk's parts in order: embedding, layers, end; each a list of modules with parameters."""
    stage, shapes = view.stage, view.held.shapes
    units: list[list[Use]] = []
    if stage.is_first and chunk == 0:
        units.append([(name,) for name in shapes if name.startswith("embedding.")])
    for layer in stage.chunks[chunk]:
        units.append([view.modules[f"decoder.layers.{layer}.{m}"] for m in view.family.layer_order])
    if stage.is_last and chunk == len(stage.chunks) - 1:
        output = (WORD_EMBEDDINGS if view.config.model.tie_embeddings else "output_layer.weight",)
        units.append([view.modules["decoder.final_layernorm"], output])
    return units

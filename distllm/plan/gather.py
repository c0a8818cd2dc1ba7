"""The order in which a rank's modules with parameters run in a step. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distllm.config.stages import microbatch_group_size
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.plan.rank_view import RankView

# Megatron's modules return these for their callers to add. DeepSpeed takes them for parameters of the module
# above, and never releases them before the update.
RETURNED_BIASES = ("self_attention.linear_proj.bias", "mlp.linear_fc1.bias", "mlp.linear_fc2.bias")
Use = tuple[str, ...]  # the parameters of a module that runs, forward or backward


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


@dataclass(frozen=True)
class Pass:
    """One pass of a chunk.

    by_rank: parameters that DeepSpeed takes for those of all chunks of the rank, by_chunk: for the chunk's
        own, although a module inside owns them.
    uses: the modules with parameters, in the order in which they run.
    ended: parameters that are released at the end, unless they are used again soon; always after a backward
        pass.
    """

    is_forward: bool
    by_rank: Use
    by_chunk: Use
    uses: list[Use]
    ended: frozenset[str]

    @property
    def fetches(self) -> list[Use]:
        """All chunks as one module, the chunk, its modules."""
        return [self.by_rank, self.by_chunk, *self.uses]


def module_passes(view: RankView, num_microbatches: int) -> Iterator[Pass]:
    """Yield the passes of a step.

    Embeddings, whose input has no gradient, are released after every backward pass
    (`release_backward_leftovers`).
    """
    stage, num_chunks = view.stage, len(view.stage.chunks)
    # Layers that run again in a backward pass do so below no chunk.
    recomputed = (n for c in reversed(range(num_chunks)) for n in reversed(_recomputed(view, c)))
    by_rank = tuple(name for layer in recomputed for name in returned_biases(view, layer))
    made: dict[tuple[int, bool], Pass] = {}
    for chunk in range(num_chunks):
        units = _units(view, chunk)
        forward = [use for unit in units for use in unit]
        backward = [use for unit in reversed(units) for use in _backward(view, unit, chunk)]
        biases = [name for layer in stage.chunks[chunk] for name in returned_biases(view, layer)]
        # Megatron asks for a tied table in the chunk's own code.
        is_end = (stage.is_first and chunk == 0) or (stage.is_last and chunk == num_chunks - 1)
        table = [WORD_EMBEDDINGS] if view.config.model.tie_embeddings and is_end else []
        embeddings = [name for use in forward for name in use if name.startswith("embedding.")]
        by_chunk = (*biases, *table)
        made[chunk, True] = Pass(True, by_rank, by_chunk, forward, frozenset(table))
        made[chunk, False] = Pass(False, by_rank, by_chunk, backward, frozenset([*table, *embeddings]))
    for place in passes(view.stage_index, view.grid.pipeline, num_chunks, num_microbatches):
        yield made[place]


def returned_biases(view: RankView, layer: int) -> list[str]:
    """Return the biases of a layer that leave their modules.

    Under sequence parallelism row-parallel projections return a function of theirs (model/layers.py).
    """
    returned = RETURNED_BIASES[1:2] if view.config.parallel.sequence else RETURNED_BIASES
    names = (f"decoder.layers.{layer}.{bias}" for bias in returned)
    return [name for name in names if name in view.held.shapes]


def _recomputed(view: RankView, chunk: int) -> range:
    """Return the layers of a chunk that run again before their backward pass."""
    layers, recompute = view.stage.chunks[chunk], view.config.recompute
    if recompute.granularity != "full":
        return layers[:0]
    return layers[: recompute.num_layers]


def _backward(view: RankView, unit: list[Use], chunk: int) -> list[Use]:
    layer = unit[0][0].removeprefix("decoder.layers.").split(".")[0]
    again = unit if layer.isdecimal() and int(layer) in _recomputed(view, chunk) else []
    # The gradients of two outputs, product and bias, each announce the module.
    twice = [[use] * (2 if any(name.endswith(RETURNED_BIASES) for name in use) else 1) for use in unit]
    return [*again, *(use for uses in reversed(twice) for use in uses)]


def _units(view: RankView, chunk: int) -> list[list[Use]]:
    """Return a chunk's parts in order: embedding, layers, end; each a list of modules with parameters."""
    stage, shapes = view.stage, view.held.shapes
    units: list[list[Use]] = []
    if stage.is_first and chunk == 0:
        units.append([(name,) for name in shapes if name.startswith("embedding.")])
    for layer in stage.chunks[chunk]:
        units.append([view.modules[f"decoder.layers.{layer}.{m}"] for m in view.family.layer_order])
    if stage.is_last and chunk == len(stage.chunks) - 1:
        units.append([view.modules["decoder.final_layernorm"]])
        if not view.config.model.tie_embeddings:
            units[-1].append(("output_layer.weight",))
        elif not stage.is_first:  # the copy of a table that is elsewhere
            units[-1].append((WORD_EMBEDDINGS,))
    return units

"""Divide layers and microbatches among pipeline stages, by Megatron Core 0.16.1's rules. Pure.

The functions are defined for legal layouts; `layout_rules.py` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config.schema import Parallel


def even_share(num_layers: int, parallel: Parallel) -> tuple[int, int]:
    """Return the layers that are divided evenly, and the number of stages that share them.

    The embedding and the output projection are among the layers where they count as such.
    """
    fixed = [n for n in (parallel.first_stage_layers, parallel.last_stage_layers) if n is not None]
    counted = num_layers + parallel.embedding_as_layer + parallel.loss_as_layer
    return counted - sum(fixed), parallel.pipeline - len(fixed)


def counted_layers_per_stage(num_layers: int, parallel: Parallel) -> list[int]:
    """Return [pipeline]: layers of each stage, with the embedding and output projection where they count."""
    shared, stages = even_share(num_layers, parallel)
    counted = [shared // max(stages, 1)] * parallel.pipeline
    counted[0] = parallel.first_stage_layers or counted[0]
    counted[-1] = parallel.last_stage_layers or counted[-1]
    return counted


def layers_per_chunk(num_layers: int, parallel: Parallel) -> list[list[int]]:
    """Return [virtual_pipeline][pipeline]: transformer layers of each chunk, in the order of the data flow.

    Megatron Core: `get_num_layers_to_build` in transformer/transformer_block.py.
    """
    counted = counted_layers_per_stage(num_layers, parallel)
    chunks = [[n // parallel.virtual_pipeline for n in counted] for _ in range(parallel.virtual_pipeline)]
    chunks[0][0] -= parallel.embedding_as_layer
    chunks[-1][-1] -= parallel.loss_as_layer
    return chunks


def microbatch_group_size(num_microbatches: int, pipeline: int) -> int:
    """Return the microbatches that a chunk takes in a row before the stage switches to its next chunk.

    Megatron Core's `microbatch_group_size_per_vp_stage`, whose default is `pipeline`. Its interleaved
    schedule (pipeline_parallel/schedules.py) needs at least `pipeline` in every group, the last one too; this
    is the smallest such size, as a larger one keeps more activations. It exists for every number of
    microbatches from `pipeline` on.
    """
    assert num_microbatches >= pipeline, f"{num_microbatches} microbatches cannot fill {pipeline} stages"
    sizes = range(pipeline, num_microbatches + 1)
    return next(n for n in sizes if num_microbatches % n == 0 or num_microbatches % n >= pipeline)


@dataclass(frozen=True)
class Stage:
    """One pipeline stage. chunks: [virtual_pipeline] ranges of layer numbers, counted from 0."""

    chunks: tuple[range, ...]
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> list[int]:
        return [layer for chunk in self.chunks for layer in chunk]


def pipeline_stages(num_layers: int, parallel: Parallel) -> list[Stage]:
    """Return the [pipeline] stages of a legal layout.

    Data passes the first chunk of all stages, then the second, ...
    """
    chunks: list[list[range]] = [[] for _ in range(parallel.pipeline)]
    next_layer = 0
    for row in layers_per_chunk(num_layers, parallel):
        for stage, size in enumerate(row):
            chunks[stage].append(range(next_layer, next_layer + size))
            next_layer += size
    assert next_layer == num_layers, f"{next_layer} layers were assigned, the model has {num_layers}"
    last = parallel.pipeline - 1
    return [Stage(tuple(held), stage == 0, stage == last) for stage, held in enumerate(chunks)]

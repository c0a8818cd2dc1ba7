"""Which layers each pipeline stage holds. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config.schema import Parallel
from distllm.config.stages import layers_per_chunk


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
    """[pipeline] stages of a legal layout. Data meets the first chunk of all stages, then the second, ..."""
    chunks: list[list[range]] = [[] for _ in range(parallel.pipeline)]
    next_layer = 0
    for row in layers_per_chunk(num_layers, parallel):
        for stage, size in enumerate(row):
            chunks[stage].append(range(next_layer, next_layer + size))
            next_layer += size
    assert next_layer == num_layers, f"{next_layer} layers were dealt out, the model has {num_layers}"
    last = parallel.pipeline - 1
    return [Stage(tuple(held), stage == 0, stage == last) for stage, held in enumerate(chunks)]

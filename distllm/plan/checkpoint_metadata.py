"""How many pieces a checkpoint is in, by module, and what it takes to know where they lie. Pure.

Each rank writes what it holds of a parameter as boxes, once for the weight and once for each moment. A box,
here a chunk, is an entry in the `.metadata` of its module, and a reader holds those of one module at a time.
ZeRO cuts as DeepSpeed 0.19.8 does it; tests/ranks/test_checkpoint_metadata.py compares with what ranks write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache

from distllm.config.schema import Config, Model
from distllm.config.stages import pipeline_stages
from distllm.layout.place import Shape, flat_range_boxes, module_of
from distllm.plan.parameters import Shapes, stage_parameters
from distllm.plan.partition import group_partitions, is_decayed

STATES = 3  # the weight and Adam's two moments
# As measured (at most 2,250 and 211) and rounded up. In memory: at the peak, which is while it is unpickled;
# half of it stays.
CHUNK_BYTES_IN_MEMORY = 2400
CHUNK_BYTES_ON_DISK = 220


def chunks_by_module(config: Config, vocab_size: int, dp_size: int) -> Counter[str]:
    """Entries in the metadata of each module, all ranks and states together."""
    model, tensor = config.model, config.parallel.tensor
    chunks: Counter[str] = Counter()
    for stage in pipeline_stages(model.num_layers, config.parallel):
        shapes = stage_parameters(model, stage, vocab_size, tensor)
        whole = stage_parameters(model, stage, vocab_size, tensor=1)
        ranges = zero_ranges(shapes, config.zero.stage, dp_size)
        for name, shape in shapes.items():
            if stage.is_last and not stage.is_first and name.startswith("embedding."):
                continue  # the tied copy, which the first stage writes
            boxes = sum(_num_boxes(_stored_shape(name, shape, model), *cut) for cut in ranges[name])
            writers = 1 if shape == whole[name] else tensor  # of what all hold, one
            chunks[module_of(name)] += STATES * writers * boxes
    return chunks


def zero_ranges(shapes: Shapes, zero_stage: int, dp_size: int) -> Mapping[str, list[tuple[int, int]]]:
    """Flat [start, stop) of each parameter that one data-parallel rank each writes."""
    if zero_stage == 0:  # whole, by one of the replicas
        return {name: [(0, math.prod(shape))] for name, shape in shapes.items()}
    if zero_stage == 3:
        return {name: list(_equal_parts(math.prod(shape), dp_size)) for name, shape in shapes.items()}
    parts = group_partitions(shapes, zero_stage, dp_size)
    offsets, ranges = [0, 0], {}
    for name, shape in shapes.items():
        group, numel = is_decayed(shape), math.prod(shape)
        ranges[name] = list(_cuts(offsets[group], numel, parts[group]))
        offsets[group] += numel
    return ranges


def _equal_parts(numel: int, dp_size: int) -> Iterator[tuple[int, int]]:
    """Stage 3 cuts each parameter into one part for each rank, as far as it goes."""
    part = -(-numel // dp_size)
    for start in range(0, numel, part):
        yield start, min(start + part, numel)


def _cuts(offset: int, numel: int, part: int) -> Iterator[tuple[int, int]]:
    """Stages 1 and 2 cut the flat group every `part` elements: where that cuts a parameter at `offset`."""
    start = 0
    while start < numel:
        stop = min(numel, part - (offset + start) % part + start)
        yield start, stop
        start = stop


@cache
def _num_boxes(shape: Shape, start: int, stop: int) -> int:
    return len(flat_range_boxes(shape, start, stop))


def _stored_shape(name: str, shape: Shape, model: Model) -> Shape:
    """As it lies in a checkpoint: gated projections are [2, ffn, hidden]."""
    is_gated = model.activation == "swiglu" and ".linear_fc1." in name
    return (2, shape[0] // 2, *shape[1:]) if is_gated else shape

"""The number of a checkpoint's pieces, by module, and the size of their metadata. Pure.

Each rank writes its part of a parameter as boxes, once for the weight and once for each state of the
optimizer. A box, here a chunk, is an entry in the `.metadata` of its module, and a reader holds those of one
module at a time. ZeRO partitions as in plan/partition.py; tests/ranks/test_checkpoint_metadata.py compares
with what ranks write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache

from distllm.config.schema import Config
from distllm.layout.flat import is_flat
from distllm.layout.grid import Grid
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.layout.place import Shape, flat_range_boxes, module_of
from distllm.plan.held import Held
from distllm.plan.partition import flat_buckets, group_partitions
from distllm.plan.rank_view import rank_views

# As measured (at most 2,250 and 211) and rounded up. In memory: at the peak, while it is unpickled; half of
# it stays.
CHUNK_BYTES_IN_MEMORY = 2400
CHUNK_BYTES_ON_DISK = 220


def chunks_by_module(config: Config, vocab_size: int, grid: Grid) -> Counter[str]:
    """Count the entries in the metadata of each module, all ranks and states together."""
    chunks: Counter[str] = Counter()
    for view in rank_views(config, vocab_size, grid):
        ranges = zero_ranges(config, view.held, view.dp_size)
        for name, entry in view.table.items():
            if name == WORD_EMBEDDINGS and not view.stage.is_first:
                continue  # the tied copy, which the first pipeline stage writes
            boxes = sum(_num_boxes(entry.local_shape(grid.degrees), *cut) for cut in ranges[name])
            is_cut = entry.cut_dim is not None  # else all ranks hold it, and one writes
            writers = grid.degrees[entry.cut_axis] if is_cut else 1
            chunks[module_of(name)] += view.recipe.tensors_per_parameter * writers * boxes
    return chunks


def zero_ranges(config: Config, held: Held, dp_size: int) -> Mapping[str, list[tuple[int, int]]]:
    """Return flat [start, stop) of each parameter, one range for each data-parallel rank that writes it."""
    sizes = {name: math.prod(shape) for name, shape in held.shapes.items()}
    zero_stage = config.zero.stage
    if zero_stage == 1 and is_flat(config.zero):
        buckets = flat_buckets(config, held, dp_size)
        pieces = [piece for b in buckets for part in range(b.num_parts) for piece in b.pieces(part)]
        flat: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
        for name, elements in pieces:
            flat[name].append((elements.start, elements.stop))
        return flat
    if zero_stage == 0:  # whole, by one of the replicas
        return {name: [(0, numel)] for name, numel in sizes.items()}
    if zero_stage == 3:
        return {name: list(_equal_parts(numel, dp_size)) for name, numel in sizes.items()}
    parts = group_partitions(held, zero_stage, dp_size)
    offsets, ranges = [0] * held.num_groups, {}
    for name, numel in sizes.items():
        group = held.group_of[name]
        ranges[name] = list(_cuts(offsets[group], numel, parts[group]))
        offsets[group] += numel
    return ranges


def _equal_parts(numel: int, dp_size: int) -> Iterator[tuple[int, int]]:
    """Yield ZeRO-3's ranges: equal parts of each parameter, one per rank, as far as its elements last."""
    part = -(-numel // dp_size)
    for start in range(0, numel, part):
        yield start, min(start + part, numel)


def _cuts(offset: int, numel: int, part: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a parameter at `offset` under DeepSpeed's ZeRO-1 and ZeRO-2.

    They cut the flat group every `part` elements.
    """
    start = 0
    while start < numel:
        stop = min(numel, part - (offset + start) % part + start)
        yield start, stop
        start = stop


@cache
def _num_boxes(shape: Shape, start: int, stop: int) -> int:
    return len(flat_range_boxes(shape, start, stop))

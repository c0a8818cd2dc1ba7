"""How ZeRO partitions a rank's parameters over the data-parallel ranks. Pure.

As engine/flat.py does, or DeepSpeed 0.19.8.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import prod

from distllm.config.schema import Config
from distllm.layout.flat import Bucket, is_flat, pack
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.plan.held import Held

# DeepSpeed makes every partition of stages 1 and 2 a multiple of two elements (nccl_start_alignment_factor).
ALIGNMENT = 2


def partition_numel(config: Config, held: Held, dp_size: int) -> int:
    """Return the elements of one data-parallel rank's partition, with padding; all of them at stage 0."""
    if is_flat(config.zero):
        return sum(bucket.part_numel for bucket in flat_buckets(config, held, dp_size))
    return sum(group_partitions(held, config.zero.stage, dp_size))


def flat_buckets(config: Config, held: Held, dp_size: int) -> list[Bucket[str]]:
    """Return the buckets of engine/flat.py."""
    sizes = {name: prod(shape) for name, shape in held.shapes.items()}
    is_copied = config.model.tie_embeddings and config.parallel.pipeline > 1
    num_parts = dp_size if config.zero.stage == 1 else 1
    return pack(sizes, config.zero.bucket_size, num_parts, {WORD_EMBEDDINGS} if is_copied else set())


def group_partitions(held: Held, zero_stage: int, dp_size: int) -> list[int]:
    """Return the elements of a partition in each of the optimizer's groups, under DeepSpeed.

    ZeRO-1 and ZeRO-2 cut each group as one flat tensor, ZeRO-3 each parameter.
    """
    return [
        sum(-(-n // dp_size) for n in group) if zero_stage == 3 else _cut(sum(group), dp_size)
        for group in held.numel_by_group
    ]


def spanned_numel(held: Held, dp_size: int) -> int:
    """Return the elements of all parameters that a ZeRO-1 or ZeRO-2 partition overlaps, at most of any rank.

    DeepSpeed keeps these gradients whole, also where the cut runs through a parameter.
    """
    groups = [[0, *accumulate(group)] for group in held.numel_by_group]
    return max(
        sum(_spanned(ends, _cut(ends[-1], dp_size), rank) for ends in groups) for rank in range(dp_size)
    )


def _spanned(ends: list[int], part: int, rank: int) -> int:
    """Return one rank's overlap. ends: the start of each parameter of the flat group, and the final end."""
    begin, end = min(rank * part, ends[-1]), min((rank + 1) * part, ends[-1])
    return 0 if begin == end else ends[bisect_left(ends, end)] - ends[bisect_right(ends, begin) - 1]


def _cut(group_numel: int, dp_size: int) -> int:
    return -(-group_numel // (dp_size * ALIGNMENT)) * ALIGNMENT

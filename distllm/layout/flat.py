"""Flat buckets of whole parameters, as stages 0 and 1 keep gradients, and stage 1 weights. Pure.

A bucket is cut into equal parts, one for each rank that shares the optimizer's states; a cut may run through
a parameter. Engine (engine/flat.py) and planner ask the same functions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

from distllm.config.schema import Zero

Key = TypeVar("Key", bound=Hashable)  # of a parameter: itself, or its name

# Elements. A part then begins at a multiple of 16 bytes in bf16 too, below which NCCL and vectorised kernels
# copy more slowly.
ALIGNMENT = 8

SMALL_SHARE = 8  # parameters smaller than a bucket by this factor share it


def is_flat(zero: Zero) -> bool:
    """Return whether engine/flat.py serves a job, or DeepSpeed: stages 2 and 3, and states in host memory."""
    return zero.stage < 2 and not zero.offload_optimizer


@dataclass(frozen=True)
class Bucket(Generic[Key]):
    """Parameters one after the other, and padding up to equal parts.

    ranges: of each parameter in the bucket.
    """

    ranges: Mapping[Key, range]
    part_numel: int
    num_parts: int

    @property
    def numel(self) -> int:
        return self.part_numel * self.num_parts

    def part(self, index: int) -> slice:
        return slice(index * self.part_numel, (index + 1) * self.part_numel)

    def pieces(self, index: int) -> Iterator[tuple[Key, range]]:
        """Yield the parameters in part `index`, each with the range of its own flat elements there."""
        part = self.part(index)
        for key, where in self.ranges.items():
            start, stop = max(where.start, part.start), min(where.stop, part.stop)
            if start < stop:
                yield key, range(start - where.start, stop - where.start)


def pack(
    sizes: Mapping[Key, int], bucket_size: int, num_parts: int, alone: Set[Key] = frozenset()
) -> list[Bucket[Key]]:
    """Divide parameters into buckets; small ones share those of at most `bucket_size` elements.

    A parameter of an eighth of that or more has its own, whose cuts then mostly fall between rows: a
    checkpoint holds one box of each part, instead of the three that a part has which begins and ends within.
    Buckets lie in the order of their first parameters, in which the next forward pass needs them; backward
    passes complete them the other way round.

    sizes: elements of each, in the order of the forward pass.
    alone: those with a bucket of their own, which is then cut alike wherever else it is held. A set, since
        tensors are only told apart by their identity there.
    """
    groups: list[dict[Key, range]] = []
    shared: dict[Key, range] = {}
    end = bucket_size  # of what is in `shared`: so far it takes nothing
    for key, numel in sizes.items():
        if key in alone or numel * SMALL_SHARE >= bucket_size:
            groups.append({key: range(numel)})
            continue
        if end + numel > bucket_size:
            shared, end = {}, 0
            groups.append(shared)
        shared[key] = range(end, end + numel)
        end += numel
    return [Bucket(ranges, _part(ranges, num_parts), num_parts) for ranges in groups]


def _part(ranges: Mapping[Key, range], num_parts: int) -> int:
    numel = max(where.stop for where in ranges.values())
    return numel if num_parts == 1 else -(-numel // (num_parts * ALIGNMENT)) * ALIGNMENT

"""The axes of parallelism, and how settings become degrees. Pure.

An axis is told here and in `layout/groups.py`, which makes its process groups; who trains, reads data or
saves asks the groups for roles. Ranks are numbered with the last axis fastest: those that talk most are
neighbours and sit on one node.
"""

from __future__ import annotations

import math

from distllm.config.schema import Parallel

AXES = ("pipeline", "data", "tensor")
# What is left of the world when all others have taken their part.
REST = "data"


def fixed_degrees(parallel: Parallel) -> dict[str, int]:
    """Axis -> degree, of those that settings fix; a setting is called like its axis."""
    return {axis: getattr(parallel, axis) for axis in AXES if axis != REST}


def ranks_of_a_replica(parallel: Parallel) -> int:
    """Ranks that together hold one copy of the model."""
    return math.prod(fixed_degrees(parallel).values())


def degrees(parallel: Parallel, world_size: int) -> dict[str, int] | None:
    """Axis -> degree, in the order of AXES; None where the fixed ones do not fit into the world."""
    replica = ranks_of_a_replica(parallel)
    if world_size % replica:
        return None
    found = fixed_degrees(parallel) | {REST: world_size // replica}
    return {axis: found[axis] for axis in AXES}

"""The axes of parallelism, and how settings become degrees. Pure.

An axis is defined here and in `layout/groups.py`, which creates its process groups; code that trains, reads
data or saves asks the groups for roles. Ranks are numbered with the last axis fastest: those that communicate
most are neighbours and sit on one node.
"""

from __future__ import annotations

import math

from distllm.config.schema import Parallel

AXES = ("pipeline", "data", "tensor")
# The rest of the world size when all other axes have their degrees.
REST = "data"


def fixed_degrees(parallel: Parallel) -> dict[str, int]:
    """Return {axis: degree}, of those that settings fix; a setting has the name of its axis."""
    return {axis: getattr(parallel, axis) for axis in AXES if axis != REST}


def ranks_of_a_replica(parallel: Parallel) -> int:
    """Return the number of ranks that together hold one copy of the model."""
    return math.prod(fixed_degrees(parallel).values())


def degrees(parallel: Parallel, world_size: int) -> dict[str, int] | None:
    """Return {axis: degree}, in the order of AXES; None where the fixed ones do not divide the world."""
    replica = ranks_of_a_replica(parallel)
    if world_size % replica:
        return None
    found = fixed_degrees(parallel) | {REST: world_size // replica}
    return {axis: found[axis] for axis in AXES}

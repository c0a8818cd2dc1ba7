"""How many elements ZeRO-3 keeps whole on a rank; the engine sets it, the plan counts with it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAYER = "decoder.layers."


@dataclass(frozen=True)
class WholeLimits:
    """DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters.

    Its defaults, 1e9 elements each, keep all of a smaller model whole between its uses, and make a step look
    through the whole step for the next use of each module, in time that grows with its square.

    reuse: a parameter stays if it is used again before as many elements of others are.
    live: no more is gathered ahead of use once as many are whole.
    """

    reuse: int
    live: int


def whole_limits(numels: Mapping[str, int], bucket_size: int) -> WholeLimits:
    """Return the limits for a rank that holds parts of these parameters, {name: elements}.

    Two of the largest layers, or of a larger parameter outside layers: the last layer of a forward pass stays
    for its backward pass. A bucket of those that are used next comes on top.
    """
    units: dict[str, int] = {}
    for name, numel in numels.items():
        unit = ".".join(name.split(".")[:3]) if name.startswith(LAYER) else name
        units[unit] = units.get(unit, 0) + numel
    reuse = 2 * max(units.values())
    return WholeLimits(reuse, reuse + bucket_size)

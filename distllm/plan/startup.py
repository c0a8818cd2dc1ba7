"""The peak of the start: the model is built and its states are made, before any activation exists. Pure.

The model is built without memory, then parameter by parameter (model/build.py), so no rank holds more than
its own part and one whole parameter; the engines make copies of their own then.
"""

from __future__ import annotations

import math

from distllm.config.schema import Config
from distllm.layout.flat import is_flat
from distllm.plan.gradients import BYTES
from distllm.plan.held import Held
from distllm.plan.partition import flat_buckets, group_partitions


def start_bytes(config: Config, held: Held, dp_size: int, weights: int, optimizer_states: int) -> int:
    """Return the most bytes on the device until the first step, beside libraries.

    weights, optimizer_states: bytes that stay on the device.
    """
    return max(
        _while_building(config, held, dp_size, weights),
        _while_states_are_made(config, held, dp_size, weights, optimizer_states),
    )


def _while_building(config: Config, held: Held, dp_size: int, weights: int) -> int:
    """Return the peak of drawing or reading weights, and of joining them.

    Our stage 1 moves weights into flat buckets, one at a time (engine/gathering.py). Stage 3 holds its parts
    and one parameter that it is about to partition (`partitioner` in engine/zero.py). DeepSpeed's stages 1
    and 2 copy the parameters of each optimizer group into one flat tensor while they still exist:
    `flatten_dense_tensors_aligned` in stage_1_and_2.py (a second copy of the weights, at the start only).
    """
    working = BYTES[config.train.precision]
    if is_flat(config.zero):
        is_moved = config.zero.stage == 1 and dp_size > 1
        buckets = flat_buckets(config, held, dp_size) if is_moved else []
        return weights + working * max((bucket.numel for bucket in buckets), default=0)
    if config.zero.stage == 3:
        return weights + working * max(map(math.prod, held.shapes.values()))
    return weights + working * max(group_partitions(held, 1, dp_size)) * dp_size


def _while_states_are_made(
    config: Config, held: Held, dp_size: int, weights: int, optimizer_states: int
) -> int:
    """Return the peak of making optimizer states.

    Stage 3 makes them by an update with a gradient of zeros as large as the largest group's part
    (`initialize_optimizer_states`), on the host where states are offloaded. DeepSpeed's stages 1 and 2 clone
    that part in the working type, on the way to its fp32 copy.
    """
    if is_flat(config.zero):
        return weights + optimizer_states
    largest = max(group_partitions(held, config.zero.stage, dp_size))
    if config.zero.stage == 3:
        zeros = 0 if config.zero.offload_optimizer else BYTES["fp32"] * largest
        return weights + optimizer_states + zeros
    return weights + optimizer_states + BYTES[config.train.precision] * largest

"""Gradient memory of one rank as DeepSpeed uses it, which is more than the ZeRO paper counts. Pure.

The paper (arXiv:1910.02054, table 1) has one gradient per parameter, partitioned from stage 2 on. DeepSpeed
0.19.8 adds to that, as measured by tests/bench/memory.py (G: bytes of a gradient, N: data-parallel ranks;
buckets and the gradient that is being computed are not counted):

- Stage 2, unless weights are bf16 and gradients fp32: gradients of a microbatch are collected in a separate
  buffer before they are added to those of earlier microbatches: 2G / N instead of G / N. Parameters that the
  partition's ends cut through count whole. With interleaved chunks it also keeps zeros for those that a
  backward pass does not reach, up to half as much again, which is not predicted here.
- The update, when no activations are left. Stages 1 and 2, unless weights are bf16 and gradients fp32, and
  stage 3: the partition of the larger optimizer group is copied into one flat fp32 tensor beside the
  gradients themselves: 4 / N more. Stage 1 first copies its partition out of the reduced gradients, before it
  frees those: G + G / N, less what has passed through the bucket by then.
- Offloaded states have fp32 gradients in host memory beside them; stage 3 keeps its gradients there, too, and
  stage 2, unless weights are bf16 and gradients fp32, adds microbatches there. Stages 1 and 2 pass the new
  weights through a buffer there, and gradients through one of the largest parameter's size.
"""

from __future__ import annotations

import math

from distllm.config.schema import Config
from distllm.layout.flat import is_flat
from distllm.plan.held import Held
from distllm.plan.partition import group_partitions, partition_numel, spanned_numel

BYTES = {"fp32": 4, "bf16": 2}


def backward_gradients(config: Config, held: Held, dp_size: int) -> int:
    """Return the most bytes on the device for the parameters `held` while activations exist."""
    zero_stage, size = config.zero.stage, BYTES[config.train.gradient_accumulation]
    if zero_stage < 2:
        return size * held.numel
    if zero_stage == 3:
        return 0 if config.zero.offload_optimizer else size * partition_numel(config, held, dp_size)
    if is_mixed(config):
        return size * partition_numel(config, held, dp_size)
    if config.zero.offload_optimizer:
        return 0
    return _buffers(config, dp_size) * size * spanned_numel(held, dp_size)


def update_gradients(config: Config, held: Held, dp_size: int) -> int:
    """Return the most bytes on the device while the optimizer updates, from the last reduction on."""
    zero_stage, size = config.zero.stage, BYTES[config.train.gradient_accumulation]
    whole = size * held.numel
    if is_flat(config.zero):
        return whole + (
            0 if size == BYTES["fp32"] else BYTES["fp32"] * partition_numel(config, held, dp_size)
        )
    if config.zero.offload_optimizer or (zero_stage == 2 and is_mixed(config)):
        part = size * partition_numel(config, held, dp_size) if is_mixed(config) and zero_stage < 3 else 0
        return part + (whole if zero_stage == 1 else 0)
    flat_copy = BYTES["fp32"] * max(group_partitions(held, zero_stage, dp_size))
    if zero_stage == 3:
        return size * partition_numel(config, held, dp_size) + flat_copy
    collected = size * spanned_numel(held, dp_size)
    return collected + flat_copy


def host_bytes(config: Config, held: Held, dp_size: int) -> int:
    """Return bytes in host memory beside offloaded states: gradients and staging buffers."""
    zero_stage, working = config.zero.stage, BYTES[config.train.precision]
    part = partition_numel(config, held, dp_size)
    fp32_gradients = BYTES["fp32"] * part
    if zero_stage == 3:
        return fp32_gradients + BYTES[config.train.gradient_accumulation] * part
    staging = working * (part + max(map(math.prod, held.shapes.values())))
    is_added_up_there = zero_stage == 2 and not is_mixed(config) and _buffers(config, dp_size) > 1
    return fp32_gradients + staging + (working * spanned_numel(held, dp_size) if is_added_up_there else 0)


def is_mixed(config: Config) -> bool:
    """Return whether gradients have higher precision than weights."""
    return config.train.precision != config.train.gradient_accumulation


def _buffers(config: Config, dp_size: int) -> int:
    """Return the number of gradient buffers: for this microbatch, and for those before it."""
    return min(2, config.train.global_batch_size // (config.train.micro_batch_size * dp_size))

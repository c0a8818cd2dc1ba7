"""The rules of layouts: how degrees of parallelism, batch and model must fit together.

They are those of Megatron Core 0.16.1 (`TransformerConfig.__post_init__` and the schedules), checked before
anything is started, and a few of ours: settings that it would silently ignore raise an error. The division of
layers among stages: `stage_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from distllm.config.axes import degrees, fixed_degrees, ranks_of_a_replica
from distllm.config.problems import Problem
from distllm.config.registry import OPTIMIZERS
from distllm.config.schema import Config
from distllm.config.stage_rules import (
    chunks_fill_the_stages,
    layers_fill_the_stages,
    recomputed_layers_exist,
    uneven_settings_have_stages,
)

Rule = Callable[[Config, int], Iterator[Problem]]


def data_parallel_size(config: Config, world_size: int) -> int | None:
    """Return the number of data-parallel ranks; None where the other axes do not fit into the world."""
    found = degrees(config.parallel, world_size)
    return found["data"] if found else None


def num_microbatches(config: Config, world_size: int) -> int | None:
    """Return the microbatches of one rank in one step; None where the batch cannot be divided."""
    ranks = data_parallel_size(config, world_size)
    if ranks is None or config.train.global_batch_size % (config.train.micro_batch_size * ranks):
        return None
    return config.train.global_batch_size // (config.train.micro_batch_size * ranks)


def world_size_fits(config: Config, world_size: int) -> Iterator[Problem]:
    degree = ranks_of_a_replica(config.parallel)
    if world_size % degree:
        names = " x ".join(f"parallel.{axis}" for axis in reversed(fixed_degrees(config.parallel)))
        rule = f"must be a multiple of {names} = {degree}"
        fix = f"start {max(world_size // degree, 1) * degree} processes, or make these degrees smaller"
        yield Problem("world size", world_size, rule, fix)


def batch_is_shared_out(config: Config, world_size: int) -> Iterator[Problem]:
    ranks = data_parallel_size(config, world_size)
    if ranks is None:
        return  # reported by world_size_fits
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = micro * ranks
    if size % unit:
        rule = (
            f"must be a multiple of train.micro_batch_size x data-parallel ranks = {micro} x {ranks} = {unit}"
        )
        below, above = size // unit * unit, (size // unit + 1) * unit
        fix = " or ".join(f"train.global_batch_size={valid}" for valid in (below, above) if valid)
        yield Problem("train.global_batch_size", size, rule, fix)


def tensor_cuts_the_model(config: Config, _: int) -> Iterator[Problem]:
    tensor, model = config.parallel.tensor, config.model
    cut = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    common = math.gcd(*cut.values())
    nearest = max(degree for degree in range(1, min(tensor, common) + 1) if common % degree == 0)
    for name, value in cut.items():
        if value % tensor:
            rule, fix = f"must divide model.{name}={value}", f"parallel.tensor={nearest}"
            if name == "num_query_groups":
                rule += ": key and value heads are neither cut nor copied"
                if model.num_attention_heads % (enough := _multiple_above(value, tensor)) == 0:
                    fix += f", or model.num_query_groups={enough}"
            yield Problem("parallel.tensor", tensor, rule, fix)
    if model.vocab_multiple % tensor:
        rule = f"must divide model.vocab_multiple={model.vocab_multiple}, which pads the vocabulary"
        fix = f"model.vocab_multiple={math.lcm(model.vocab_multiple, tensor)}"
        yield Problem("parallel.tensor", tensor, rule, fix)


def sequence_is_cut(config: Config, _: int) -> Iterator[Problem]:
    tensor, seq_length = config.parallel.tensor, config.model.seq_length
    if not config.parallel.sequence:
        return
    if tensor == 1:
        rule = "must be false for parallel.tensor=1: the sequence is cut over the tensor-parallel ranks"
        yield Problem("parallel.sequence", True, rule, "parallel.sequence=false, or parallel.tensor=2")
    elif seq_length % tensor:
        rule = f"must be a multiple of parallel.tensor={tensor} for parallel.sequence=true"
        fix = f"model.seq_length={_multiple_above(seq_length, tensor)}, or parallel.sequence=false"
        yield Problem("model.seq_length", seq_length, rule, fix)


def microbatches_fill_the_chunks(config: Config, world_size: int) -> Iterator[Problem]:
    """Check the number of microbatches: any for 1F1B, at least one per stage for the interleaved schedule."""
    parallel, train = config.parallel, config.train
    microbatches = num_microbatches(config, world_size)
    if microbatches is None or parallel.virtual_pipeline == 1 or microbatches >= parallel.pipeline:
        return
    rule = (
        f"must make at least parallel.pipeline={parallel.pipeline} microbatches per rank for "
        f"parallel.virtual_pipeline={parallel.virtual_pipeline}, makes {microbatches}"
    )
    enough = train.global_batch_size // microbatches * parallel.pipeline
    fix = (
        f"train.global_batch_size={enough}, a smaller train.micro_batch_size, or parallel.virtual_pipeline=1"
    )
    yield Problem("train.global_batch_size", train.global_batch_size, rule, fix)


def zero_has_what_is_asked(config: Config, _: int) -> Iterator[Problem]:
    yield from OPTIMIZERS[config.optimizer.kind].problems(config)
    if config.zero.stage == 0 and config.zero.offload_optimizer:
        rule = "must be false for zero.stage=0, which keeps optimizer states whole, on the device"
        fix = "zero.offload_optimizer=false, or zero.stage=1"
        yield Problem("zero.offload_optimizer", True, rule, fix)
    is_offloaded = config.zero.stage == 1 and config.zero.offload_optimizer  # DeepSpeed's stage 1
    if is_offloaded and config.zero.overlap_comm and config.parallel.virtual_pipeline > 1:
        # DeepSpeed 0.19.8 reduces during the backward pass of the last microbatch through one chunk only:
        # gradients of the other chunks are left out, and the loss is off in the third digit after three
        # steps.
        rule = (
            "must be false for zero.stage=1 with zero.offload_optimizer=true and interleaved chunks "
            f"(parallel.virtual_pipeline={config.parallel.virtual_pipeline}), whose gradients would get lost"
        )
        yield Problem("zero.overlap_comm", True, rule, "zero.overlap_comm=false, or zero.stage=2")


def _multiple_above(number: int, unit: int) -> int:
    return -(-number // unit) * unit


LAYOUT_RULES: tuple[Rule, ...] = (
    world_size_fits,
    tensor_cuts_the_model,
    sequence_is_cut,
    uneven_settings_have_stages,
    layers_fill_the_stages,
    chunks_fill_the_stages,
    batch_is_shared_out,
    microbatches_fill_the_chunks,
    recomputed_layers_exist,
    zero_has_what_is_asked,
)

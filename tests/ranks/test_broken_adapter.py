"""Every fix of the adapter is needed, and the tests see it: switched off in turn, each makes a job go wrong.

Wrong means: it raises, it hangs (the deadline ends it), or its trace differs from the single process's.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jobs
import pytest
from harness import RanksFailedError, run_ranks

from distllm.engine.deepspeed_quirks import forward_in_flight_counters
from distllm.engine.zero import ZeroEngine
from distllm.layout.flat import pack

STEPS = 4
HANG_SECONDS = 25
TIED = "model.tie_embeddings=true"
PIPELINE = ("parallel.pipeline=2",)
INTERLEAVED = (*PIPELINE, "parallel.virtual_pipeline=2")
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
OFFLOAD = "zero.offload_optimizer=true"
GPT2_BIASES = ("model.bias=true", "model.normalization=layernorm", "model.activation=gelu")
# Away from multiples, so that a stage has more parameters than the other.
UNEVEN = (*PIPELINE, "parallel.first_stage_layers=1")


@dataclass(frozen=True)
class Fix:
    """target: what is replaced, and by what. layout: (ranks, overrides) of a job that needs it. model: of the
    reference too."""

    target: str
    replacement: Callable[..., Any]
    ranks: int
    layout: tuple[str, ...]
    model: tuple[str, ...] = ()


def nothing(*_: Any, **__: Any) -> None:
    return None


def no_counters(*_: Any) -> list[Any]:
    return []


def native_reset(*_: Any) -> Callable[[], None]:
    return nothing


def one_size(*_: Any) -> int:
    return 8000  # less than a stage, so that stages of other sizes have other numbers of sub-groups


def packed_without_exception(sizes: Any, bucket_size: int, num_parts: int, _: Any) -> Any:
    return pack(sizes, bucket_size, num_parts)


def first_argument(parameter: Any, *_: Any) -> Any:
    return parameter


def always_first(engine: Any, *_: Any) -> None:
    if hasattr(engine.zero_optimizer, "micro_step_id"):
        engine.zero_optimizer.micro_step_id = 0


def count_all_passes(engine: Any, *_: Any) -> bool:
    done: bool = all(number == engine.num_microbatches for number in engine.num_backwards)
    return done


def divide_twice(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def config_with_accumulation(*args: Any) -> dict[str, Any]:
        return {**original(*args), "gradient_accumulation_steps": 4}

    return config_with_accumulation


def batched_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    def transformer_config(*args: Any) -> Any:
        config = original(*args)
        config.batch_p2p_comm = True
        return config

    return transformer_config


ZERO, QUIRKS = "distllm.engine.zero", "distllm.engine.deepspeed_quirks"
FIXES = {
    "the mark of cut parameters": Fix(
        "distllm.model.sharding._mark_cut", nothing, 2, ("zero.stage=2", "parallel.tensor=2")
    ),
    "norm weights summed over the sequence": Fix(
        "distllm.model.norm.copy_to_tensor_model_parallel_region",
        first_argument,
        2,
        ("zero.stage=0", *SEQUENCE),
    ),
    "row biases summed over the sequence": Fix(
        "distllm.model.layers.summed_over_sequence",
        first_argument,
        2,
        ("zero.stage=0", *SEQUENCE),
        GPT2_BIASES,
    ),
    "tied gradients added up, stage 0": Fix(
        "distllm.engine.flat.tied_copy", nothing, 2, ("zero.stage=0", *PIPELINE), (TIED,)
    ),
    "tied copies cut alike, stage 1": Fix(
        "distllm.engine.flat.pack",
        packed_without_exception,
        4,
        ("zero.stage=1", *PIPELINE, "zero.bucket_size=10_000_000"),
        (TIED,),
    ),
    "tied gradients added up, stage 2": Fix(
        f"{ZERO}.tied_copy", nothing, 2, ("zero.stage=2", *PIPELINE), (TIED,)
    ),
    "replicas counted once": Fix(f"{ZERO}.count_replicas_once", nothing, 2, ("zero.stage=3", *PIPELINE)),
    "tied copies counted once": Fix(
        f"{ZERO}.count_replicas_once", nothing, 2, ("zero.stage=2", *PIPELINE), (TIED,)
    ),
    "one reset of the trace per step": Fix(
        f"{ZERO}.reset_trace_once_per_step", native_reset, 4, ("zero.stage=3", *PIPELINE)
    ),
    "micro-steps of each chunk, stage 3": Fix(
        f"{ZERO}.ZeroEngine._set_micro_step", nothing, 2, ("zero.stage=3", *INTERLEAVED)
    ),
    "micro-steps that add, stage 3": Fix(
        f"{ZERO}.ZeroEngine._set_micro_step", always_first, 2, ("zero.stage=3", *PIPELINE)
    ),
    "micro-steps of each chunk under offload, stage 2": Fix(
        f"{ZERO}.ZeroEngine._set_micro_step", nothing, 2, ("zero.stage=2", *INTERLEAVED, OFFLOAD)
    ),
    "boundary of each chunk under offload": Fix(
        f"{ZERO}.ZeroEngine._is_boundary", count_all_passes, 2, ("zero.stage=2", *INTERLEAVED, OFFLOAD)
    ),
    "equal numbers of sub-groups": Fix(
        f"{ZERO}._largest_stage_numel", one_size, 2, ("zero.stage=3", *UNEVEN)
    ),
    "only Megatron divides the loss": Fix(
        f"{ZERO}.deepspeed_config", divide_twice, 2, ("zero.stage=2", *PIPELINE)
    ),
    "named messages between stages": Fix(
        "distllm.model.build.transformer_config", batched_messages, 2, ("zero.stage=0", *INTERLEAVED)
    ),
}
WRAPPERS = (divide_twice, batched_messages)


def trace(rank: int, overrides: tuple[str, ...], broken: str | None) -> jobs.Trace:
    if broken is None:
        return _train(overrides)
    fix = FIXES[broken]
    replacement = fix.replacement
    if replacement in WRAPPERS:
        module, _, name = fix.target.rpartition(".")
        replacement = replacement(getattr(__import__(module, fromlist=[name]), name))
    with mock.patch(fix.target, replacement):
        return _train(overrides)


def _train(overrides: tuple[str, ...]) -> jobs.Trace:
    config = jobs.make_config(*overrides)
    engine = jobs.build_engine(config)
    result = jobs.train(engine, config, STEPS)
    jobs.finish(engine)
    return result


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], jobs.Trace]:
    models = {fix.model for fix in FIXES.values()}
    return {model: run_ranks(1, trace, ("zero.stage=0", *model), None)[0] for model in models}


def compare(results: list[jobs.Trace], expected: jobs.Trace) -> None:
    for rank, result in enumerate(results):
        jobs.assert_traces_equal(result, expected, f"rank {rank}")


@pytest.mark.long
@pytest.mark.parametrize("name", FIXES)
def test_without_the_fix_the_job_goes_wrong(name: str, references: dict[tuple[str, ...], jobs.Trace]) -> None:
    fix = FIXES[name]
    pkgutil.resolve_name(fix.target)  # else the ranks would fail for want of it, and show nothing
    overrides, expected = (*fix.layout, *fix.model), references[fix.model]
    compare(run_ranks(fix.ranks, trace, overrides, None), expected)
    with pytest.raises((RanksFailedError, AssertionError)):
        compare(run_ranks(fix.ranks, trace, overrides, name, deadline_seconds=HANG_SECONDS), expected)


def test_counters_of_forwards_in_flight_let_go_of_parameters() -> None:
    """Without them the numbers are right, but a backward pass of the cool-down keeps what it gathers: stage 3
    then needs the memory of a whole pipeline stage (8 layers here) instead of that of a layer or two."""
    layout = ("zero.stage=3", *PIPELINE, "model.num_layers=16")
    with_counters = run_ranks(2, gathered_share, layout, forward_in_flight_counters)
    without = run_ranks(2, gathered_share, layout, no_counters)
    assert max(with_counters) < 0.4
    assert max(without) > 0.8


def gathered_share(rank: int, overrides: tuple[str, ...], counters: Callable[..., Any]) -> float:
    """The most that is held of this stage's parameters at any time in a backward pass, as a share."""
    config = jobs.make_config(*overrides)
    engine = jobs.build_engine(config)
    assert isinstance(engine, ZeroEngine), "stage 3 is DeepSpeed's"
    held: list[int] = []
    offload = engine.zero_optimizer.parameter_offload
    before_module = offload.pre_sub_module_backward_function

    def look(module: Any) -> None:
        before_module(module)
        held.append(sum(parameter.data.numel() for parameter in engine.places))

    with (
        mock.patch.object(offload, "pre_sub_module_backward_function", look),
        mock.patch(f"{ZERO}.forward_in_flight_counters", counters),
    ):
        jobs.train(engine, config, 1)
    jobs.finish(engine)
    return max(held) / sum(math.prod(place.local_shape) for place in engine.places.values())

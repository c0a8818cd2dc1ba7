"""Activation memory against hand-computed values and the published formulae."""

import pytest
from shapes import config_of, llama

from distllm.config.schema import Config
from distllm.config.stages import pipeline_stages
from distllm.model.families import family_of
from distllm.plan.activations import (
    microbatches_in_flight,
    recomputed_elements_per_token,
    stage_elements_per_token,
)

EIGHT_B = 4 * 4096 + (4096 + 2048) + 4096 + (4096 + 1024) + 4 * 14336  # norms, qkv, context, rotated, FFN


def kept(config: Config) -> int:
    return stage_elements_per_token(config, pipeline_stages(config.model.num_layers, config.parallel)[0])


def test_a_layer_of_llama_8b_by_hand() -> None:
    model = llama("llama3_8b", "world_size=1").model
    assert family_of(model).activations(model) == EIGHT_B == 89_088
    assert family_of(model).activations(model, tensor=8) == 4 * 4096 + (EIGHT_B - 4 * 4096) // 8
    assert family_of(model).activations(model, tensor=8, sequence=True) == EIGHT_B // 8


def test_a_layer_of_gpt2_by_hand() -> None:
    model = config_of("model=gpt2_124m", "world_size=1").model
    assert family_of(model).activations(model) == (4 + 3 + 1 + 2 * 4) * 768  # no rotation, no gate


@pytest.mark.parametrize(
    ("overrides", "layers_kept", "inputs_kept"),
    [
        ((), 8, 0),
        (("recompute=selective",), 8, 0),
        (("recompute=full",), 0, 8),
        (("recompute=full", "recompute.num_layers=3"), 5, 3),
    ],
)
def test_recomputed_layers_keep_their_inputs(
    overrides: tuple[str, ...], layers_kept: int, inputs_kept: int
) -> None:
    config = config_of(*overrides, "world_size=1")
    layer = family_of(config.model).activations(config.model)
    assert kept(config) == layers_kept * layer + inputs_kept * config.model.hidden_size
    assert recomputed_elements_per_token(config) == (layer if "recompute=full" in overrides else 0)


def test_layers_are_recomputed_in_every_chunk() -> None:
    chunks = (
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "train.micro_batch_size=1",
        "world_size=2",
    )
    config = config_of(*chunks, "recompute=full", "recompute.num_layers=1")
    inputs_and_what_is_sent = (2 + 2) * config.model.hidden_size
    assert kept(config) == 2 * family_of(config.model).activations(config.model) + inputs_and_what_is_sent


def test_what_interleaved_chunks_send_is_kept() -> None:
    """By all but the last chunk of the model, which sends nothing."""
    config = config_of(
        "parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch_size=1", "world_size=2"
    )
    first, last = pipeline_stages(config.model.num_layers, config.parallel)
    difference = stage_elements_per_token(config, first) - stage_elements_per_token(config, last)
    assert difference == config.model.hidden_size


def in_flight(pipeline: int, virtual: int, microbatches: int) -> list[float]:
    config = config_of(
        "model.num_layers=16",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_pipeline={virtual}",
        "train.micro_batch_size=1",
        f"train.global_batch_size={microbatches}",
        f"world_size={pipeline}",
    )
    return [microbatches_in_flight(config, stage, microbatches) for stage in range(pipeline)]


def test_1f1b_holds_one_microbatch_per_stage_ahead() -> None:
    assert in_flight(4, 1, 32) == [4, 3, 2, 1]
    assert in_flight(4, 1, 2) == [2, 2, 2, 1]
    assert in_flight(1, 1, 32) == [1]


def test_interleaving_holds_what_korthikanti_et_al_say() -> None:
    p, v = 4, 2
    first, *_ = in_flight(p, v, 32)
    assert first == p * (1 + (p - 1) / (p * v)) == 5.5


def test_interleaving_holds_what_megatrons_schedule_warms_up() -> None:
    assert in_flight(4, 2, 32) == [(2 * (3 - stage) + 4 + 1) / 2 for stage in range(4)]
    assert in_flight(2, 2, 5)[0] == (2 + 3 + 1) / 2  # groups of 3, as 5 are no multiple of 2
    assert in_flight(4, 2, 4)[0] == 4  # never more than there are

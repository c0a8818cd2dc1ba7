"""The rules of layouts: each broken one names setting, rule and a fix, and they refuse what Megatron does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from test_rules import problems_of

from distllm.config import compose, rules
from distllm.config.schema import Parallel
from distllm.config.stages import layers_per_chunk, microbatch_group_size, pipeline_stages

BASE_OVERRIDES = ("model.num_layers=8",)
PP4 = "parallel.pipeline=4"
# world size, the overrides that break a rule, the setting that is named, a part of the rule, and those that
# keep it. The model has 8 layers, 8 heads in 4 groups, sequences of 256 tokens, batches of 16 in 4s.
BROKEN = {
    "world": (3, "parallel.tensor=2", "world size", "= 2", "parallel.tensor=1 train.global_batch_size=12"),
    "batch": (
        2,
        "train.global_batch_size=10",
        "train.global_batch_size",
        "4 x 2 = 8",
        "train.global_batch_size=8",
    ),
    "heads": (
        8,
        "parallel.tensor=8 model.num_attention_heads=4 model.num_query_groups=4",
        "parallel.tensor",
        "num_attention_heads=4",
        "parallel.tensor=4",
    ),
    "key-value groups": (
        8,
        "parallel.tensor=8",
        "parallel.tensor",
        "num_query_groups=4: key and value heads are neither cut nor copied",
        "model.num_query_groups=8",
    ),
    "feed-forward": (
        2,
        "parallel.tensor=2 model.ffn_hidden_size=705",
        "parallel.tensor",
        "=705",
        "parallel.tensor=1",
    ),
    "vocabulary": (
        2,
        "parallel.tensor=2 model.vocab_multiple=1",
        "parallel.tensor",
        "vocab_multiple=1",
        "model.vocab_multiple=2",
    ),
    "no ranks to cut over": (
        1,
        "parallel.sequence=true",
        "parallel.sequence",
        "tensor=1",
        "parallel.sequence=false",
    ),
    "odd sequence": (
        2,
        "parallel.tensor=2 parallel.sequence=true model.seq_length=255",
        "model.seq_length",
        "multiple of parallel.tensor=2",
        "model.seq_length=256",
    ),
    **{
        f"no stages for {name}": (
            1,
            f"parallel.{name}={value}",
            f"parallel.{name}",
            "one stage",
            f"parallel.{name}={empty}",
        )
        for name, value, empty in (
            ("first_stage_layers", 2, "null"),
            ("last_stage_layers", 2, "null"),
            ("embedding_as_layer", "true", "false"),
            ("loss_as_layer", "true", "false"),
        )
    },
    "placed and counted": (
        4,
        f"{PP4} parallel.first_stage_layers=2 parallel.loss_as_layer=true",
        "parallel.loss_as_layer",
        "which place layers outright",
        "parallel.loss_as_layer=false",
    ),
    "stages of unequal size": (
        3,
        "parallel.pipeline=3",
        "parallel.pipeline",
        "8 layers",
        "model.num_layers=9",
    ),
    "counted layers": (
        4,
        f"{PP4} parallel.embedding_as_layer=true",
        "parallel.pipeline",
        "9 layers, of which 1 stand for",
        "model.num_layers=7",
    ),
    "nothing left for the middle": (
        4,
        f"{PP4} parallel.first_stage_layers=8",
        "parallel.first_stage_layers",
        "leaves 0",
        "parallel.first_stage_layers=5",
    ),
    "an uneven rest": (
        4,
        f"{PP4} parallel.last_stage_layers=3",
        "parallel.last_stage_layers",
        "leaves 5",
        "parallel.last_stage_layers=2",
    ),
    "two stages, both placed": (
        2,
        "parallel.pipeline=2 parallel.first_stage_layers=3 parallel.last_stage_layers=4",
        "parallel.last_stage_layers",
        "must make model.num_layers=8",
        "parallel.last_stage_layers=5",
    ),
    "chunks of one stage": (
        1,
        "parallel.virtual_pipeline=2",
        "parallel.virtual_pipeline",
        "must be 1",
        "parallel.virtual_pipeline=1",
    ),
    "chunks of unequal size": (
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=3",
        "parallel.virtual_pipeline",
        "every stage: 4",
        "parallel.virtual_pipeline=4",
    ),
    "chunks of a placed stage": (
        4,
        f"{PP4} parallel.first_stage_layers=5 parallel.virtual_pipeline=5 train.micro_batch_size=1",
        "parallel.virtual_pipeline",
        "every stage: 1, 5",
        "parallel.virtual_pipeline=1",
    ),
    "an empty chunk": (
        2,
        "parallel.pipeline=2 model.num_layers=7 parallel.virtual_pipeline=4 parallel.loss_as_layer=true",
        "parallel.virtual_pipeline",
        "a layer beside the embedding or the loss",
        "parallel.virtual_pipeline=2",
    ),
    "an empty stage": (
        4,
        "parallel.pipeline=4 model.num_layers=3 parallel.embedding_as_layer=true",
        "parallel.pipeline",
        "a layer beside the embedding or the loss",
        "model.num_layers=7",
    ),
    "too few microbatches to interleave": (
        4,
        f"{PP4} parallel.virtual_pipeline=2 train.global_batch_size=12",
        "train.global_batch_size",
        "makes 3",
        "train.global_batch_size=16",
    ),
    "no layers to recompute": (
        1,
        "recompute.num_layers=2",
        "recompute.num_layers",
        "must be null",
        "recompute.granularity=full",
    ),
    "more layers than there are": (
        2,
        "parallel.pipeline=2 recompute=full recompute.num_layers=5",
        "recompute.num_layers",
        "the 4 layers",
        "recompute.num_layers=4",
    ),
    "gradients of other chunks lost": (
        2,
        "zero.stage=1 zero.offload_optimizer=true zero.overlap_comm=true "
        "parallel.pipeline=2 parallel.virtual_pipeline=2",
        "zero.overlap_comm",
        "interleaved chunks (parallel.virtual_pipeline=2)",
        "zero.stage=2",
    ),
    "nothing to offload": (
        1,
        "zero.stage=0 zero.offload_optimizer=true",
        "zero.offload_optimizer",
        "zero.stage=0",
        "zero.stage=1",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_rule_is_named_alone_and_kept_again(kind: str) -> None:
    world_size, breaking, setting, rule, keeping = BROKEN[kind]
    problems = problems_of(*BASE_OVERRIDES, *breaking.split(), world_size=world_size)
    assert {problem.setting for problem in problems} == {setting}
    assert any(rule in problem.rule for problem in problems), [problem.rule for problem in problems]
    assert all(problem.fix for problem in problems)
    assert problems_of(*BASE_OVERRIDES, *breaking.split(), *keeping.split(), world_size=world_size) == []


def test_all_reasons_are_given_at_once() -> None:
    overrides = "parallel.tensor=3 parallel.pipeline=3 parallel.virtual_pipeline=2 recompute.num_layers=1"
    named = [problem.setting for problem in problems_of(*BASE_OVERRIDES, *overrides.split(), world_size=10)]
    assert named == ["world size", *["parallel.tensor"] * 4, "parallel.pipeline", "recompute.num_layers"]


@pytest.mark.parametrize("microbatches", range(1, 9))
def test_1f1b_takes_any_number_of_microbatches(microbatches: int) -> None:
    batch = f"train.micro_batch_size=1 train.global_batch_size={microbatches}"
    assert problems_of(*BASE_OVERRIDES, PP4, *batch.split(), world_size=4) == []


@settings(deadline=None)
@given(size=st.integers(1, 500), micro=st.integers(1, 40), ranks=st.integers(1, 16))
def test_the_batch_sizes_that_are_proposed_are_valid(size: int, micro: int, ranks: int) -> None:
    assume(size % (micro * ranks))
    train = replace(BASE.train, global_batch_size=size, micro_batch_size=micro)
    (problem,) = rules.check(replace(BASE, train=train), ranks)
    proposed = [int(number) for number in re.findall(r"=(\d+)", problem.fix)]
    assert proposed
    assert all(number > 0 and number % (micro * ranks) == 0 for number in proposed)
    assert min(abs(number - size) for number in proposed) < micro * ranks


@given(pipeline=st.integers(2, 64), more=st.integers(0, 400))
def test_microbatches_are_grouped_as_megatron_demands(pipeline: int, more: int) -> None:
    """`forward_backward_pipelining_with_interleaving`: p <= group <= m, the last group empty or >= p."""
    microbatches = pipeline + more
    group = microbatch_group_size(microbatches, pipeline)
    assert pipeline <= group <= microbatches
    assert microbatches % group == 0 or microbatches % group >= pipeline
    assert (group == pipeline) == (microbatches % pipeline == 0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, Parallel]:
    pipeline = draw(st.integers(1, 6))
    optional = st.none() | st.integers(1, 8)
    parallel = Parallel(
        tensor=1,
        sequence=False,
        pipeline=pipeline,
        virtual_pipeline=draw(st.integers(1, 3)),
        first_stage_layers=draw(optional),
        last_stage_layers=draw(optional),
        embedding_as_layer=draw(st.booleans()),
        loss_as_layer=draw(st.booleans()),
    )
    return draw(st.integers(1, 24)), parallel


@settings(deadline=None, max_examples=600)
@given(layouts())
def test_layers_are_dealt_as_megatron_deals_them(layout: tuple[int, Parallel]) -> None:
    """Legal with us is legal with Megatron and gives the same layers; of what Megatron takes, we refuse only
    what it would ignore, and chunks without a layer: it takes 0, and even fewer, without a word."""
    num_layers, parallel = layout
    model = replace(BASE.model, num_layers=num_layers)
    train = replace(BASE.train, global_batch_size=16, micro_batch_size=1)
    config = replace(BASE, model=model, parallel=parallel, train=train)
    problems = rules.check(config, parallel.pipeline)
    theirs = megatron_chunks(num_layers, parallel)
    if not problems:
        stages = pipeline_stages(num_layers, parallel)
        assert theirs == [[(len(chunk), chunk.start) for chunk in stage.chunks] for stage in stages]
    elif theirs is not None:
        is_ignored = parallel.pipeline == 1
        has_empty_chunk = any(size < 1 for stage in theirs for size, _ in stage)
        assert is_ignored or has_empty_chunk, problems


def megatron_chunks(num_layers: int, parallel: Parallel) -> list[list[tuple[int, int]]] | None:
    """[pipeline][virtual_pipeline] (layers, first layer) by Megatron Core; None where it refuses."""
    interleaved = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    arguments: dict[str, Any] = {
        "num_layers": num_layers,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": interleaved,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        "account_for_embedding_in_pipeline_split": parallel.embedding_as_layer,
        "account_for_loss_in_pipeline_split": parallel.loss_as_layer,
        "pipeline_dtype": float,
    }
    chunks = range(parallel.virtual_pipeline) if interleaved else [None]
    try:
        config = TransformerConfig(**arguments)
        return [
            [
                (
                    get_num_layers_to_build(config, chunk, stage),
                    get_transformer_layer_offset(config, chunk, stage),
                )
                for chunk in chunks
            ]
            for stage in range(parallel.pipeline)
        ]
    except (ValueError, AssertionError, ZeroDivisionError):
        return None


def test_llama_405b_has_126_layers_so_that_the_ends_count() -> None:
    """Llama 3 405B (arXiv:2407.21783, section 3.3.2) runs on 16 stages with one layer less at both ends."""
    parallel = replace(BASE.parallel, pipeline=16, embedding_as_layer=True, loss_as_layer=True)
    assert layers_per_chunk(126, parallel) == [[7, *[8] * 14, 7]]


BASE = compose.load(compose.parse("train", BASE_OVERRIDES))

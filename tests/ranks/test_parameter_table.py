"""The table of parameters is the built module: names, shapes, order, cuts; and the order of modules."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest
import torch
from harness import run_ranks
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn

from distllm.config import compose
from distllm.config.schema import Config
from distllm.config.stages import pipeline_stages
from distllm.layout.grid import Grid
from distllm.layout.groups import create_groups, release_groups
from distllm.model import build
from distllm.model.families import family_of
from distllm.model.parameters import stage_parameters

SHAPES = sorted(path.stem for path in Path(__file__).parents[2].glob("conf/model/*.yaml"))
# Every shipped shape as it is, and one of each family with what its settings can switch.
SWITCHES = (
    "model.tie_embeddings=true",
    "model.tie_embeddings=false",
    "model.bias=true",
    "model.bias=false",
    "model.normalization=layernorm",
    "model.normalization=rmsnorm",
    "model.activation=swiglu",
)
CASES: list[tuple[str, tuple[str, ...]]] = [(shape, ()) for shape in SHAPES]
CASES += [(shape, (switch,)) for shape in ("tiny", "gpt2_124m") for switch in SWITCHES]
LAYOUTS = {1: (), 4: ("parallel.tensor=2", "parallel.pipeline=2")}
CASES_OF_RANKS = [case for case in CASES if case[0] in ("tiny", "gpt2_124m") and "swiglu" not in str(case)]


def config_of(shape: str, world_size: int, variant: tuple[str, ...]) -> Config:
    layout = (*LAYOUTS[world_size], "train.global_batch_size=8", "train.micro_batch_size=1")
    training = [f"world_size={world_size}", "tokenizer=bytes", "train.precision=bf16"]
    arguments = [f"model={shape}", *variant, *layout, *training]
    return compose.load(compose.parse("check", arguments))


def compare(rank: int, world_size: int) -> None:
    """On the meta device: 405 billion parameters are only described."""
    for shape, variant in CASES if world_size == 1 else CASES_OF_RANKS:
        config = config_of(shape, world_size, variant)
        grid = Grid.of(config.parallel, world_size)
        groups = create_groups(grid, jobs.TIMEOUT)
        built = build.build_model(config, jobs.VOCAB_SIZE, groups, torch.device("meta"))
        stage = pipeline_stages(config.model.num_layers, config.parallel)[groups.coordinates.pipeline]
        table = stage_parameters(config.model, stage, config.model.padded_vocab_size(jobs.VOCAB_SIZE))
        # Names in the order by which ZeRO cuts; a tied copy comes last in both.
        assert [place.name for place in built.places.values()] == list(table), (shape, variant)
        for parameter, place in built.places.items():
            entry = table[place.name]
            assert tuple(parameter.shape) == entry.module_shape(grid.degrees), (shape, place.name)
            assert parameter.dtype == torch.bfloat16, (shape, place.name)  # every one computes in bf16
            assert entry.is_decayed == (len(entry.shape) > 1 and not entry.name.endswith(".bias"))
        for chunk in built.chunks:
            check_cuts(chunk, {p: table[place.name].module_cut_dim for p, place in built.places.items()})
        release_groups(groups)


def check_cuts(model: nn.Module, cut_dims: dict[nn.Parameter, int | None]) -> None:
    """As Megatron Core's layers cut: rows of those by column, columns of those by row."""
    expected: dict[nn.Parameter, int | None] = dict.fromkeys(model.parameters())
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            expected |= dict.fromkeys(module.parameters(recurse=False), 0)
        elif isinstance(module, RowParallelLinear):
            expected[module.weight] = 1
    assert {p: cut_dims[p] for p in expected} == expected


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_the_table_is_the_module_of_every_shipped_shape(world_size: int) -> None:
    run_ranks(world_size, compare, world_size)


def record_order(rank: int, overrides: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
    """Modules of layer 1 that hold parameters, in the order in which a forward pass runs them."""
    config = jobs.make_config(*overrides, "zero.stage=0")
    engine = jobs.build_engine(config)
    ran: list[str] = []
    for name, module in engine.chunks[0].named_modules():
        if ".layers.1." in name and any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name.split(".layers.1.")[1]))
    engine.evaluate(jobs.microbatches(0, config, engine.groups)[:1])
    jobs.finish(engine)
    return ran, family_of(config.model).layer_order


@pytest.mark.parametrize("overrides", [(), jobs.SMALL_GPT2], ids=["llama", "gpt2"])
def test_modules_run_in_the_order_of_the_family(overrides: tuple[str, ...]) -> None:
    (result,) = run_ranks(1, record_order, overrides)
    ran, said = result
    assert tuple(ran) == said

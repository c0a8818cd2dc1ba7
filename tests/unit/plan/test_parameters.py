"""The parts of the model add up to the model."""

import math

import pytest
from shapes import LLAMA_VOCABULARY, config_of, llama

from distllm.config.schema import Config
from distllm.layout.grid import Grid
from distllm.model.parameters import count_parameters
from distllm.plan.rank_view import RankView, rank_views

VOCABULARY = 300
GPT2 = ("model=gpt2_124m", "model.num_layers=8")


def stages_of(config: Config, vocab_size: int, tensor: int) -> list[int]:
    grid = Grid(tensor=tensor, pipeline=config.parallel.pipeline)
    return [view.held.numel for view in rank_views(config, vocab_size, grid)]


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("model", [(), GPT2], ids=["llama", "gpt2"])
def test_stages_add_up_to_the_padded_model(model: tuple[str, ...], pipeline: int, tied: str) -> None:
    config = config_of(
        *model, f"parallel.pipeline={pipeline}", f"model.tie_embeddings={tied}", f"world_size={pipeline}"
    )
    padded = config.model.padded_vocab_size(VOCABULARY)
    assert padded == 384
    copy = padded * config.model.hidden_size if tied == "true" and pipeline > 1 else 0
    total = sum(stages_of(config, VOCABULARY, tensor=1))
    assert total == count_parameters(config.model, padded).total + copy


@pytest.mark.parametrize("model", [(), GPT2], ids=["llama", "gpt2"])
def test_tensor_ranks_add_up_to_the_model_and_their_replicas(model: tuple[str, ...]) -> None:
    config = config_of(*model, "world_size=1")
    whole = RankView(config, VOCABULARY, Grid(tensor=1), 0).held.shapes
    part = RankView(config, VOCABULARY, Grid(tensor=4), 0).held.shapes
    assert part.keys() == whole.keys()
    replicas = {name for name in whole if part[name] == whole[name]}
    cut = whole.keys() - replicas
    assert all(math.prod(whole[name]) == 4 * math.prod(part[name]) for name in cut)
    ends = {name.split(".layers.")[-1].partition(".")[2] for name in replicas if ".layers." in name}
    row_parallel = {"self_attention.linear_proj.bias", "mlp.linear_fc2.bias"} if model else set()
    norms = {f"{norm}.{w}" for norm in ("input_layernorm", "pre_mlp_layernorm") for w in ("weight", "bias")}
    assert ends == row_parallel | (norms if model else {norm for norm in norms if norm.endswith("weight")})


def test_the_published_size_of_llama_70b_comes_out() -> None:
    config = llama("llama3_70b", "parallel.pipeline=4", "world_size=4")
    assert sum(stages_of(config, LLAMA_VOCABULARY, tensor=1)) == 70_553_706_496

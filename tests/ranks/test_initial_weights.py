"""Initial weights: from seed and name alone, with the statistics that the config asks for."""

from __future__ import annotations

import math

import jobs
import pytest
import torch
from harness import run_ranks
from torch import Tensor


def initial_weights(rank: int, cases: list[tuple[str, ...]]) -> list[dict[str, Tensor]]:
    result = []
    for overrides in cases:
        engine = jobs.build_engine(jobs.make_config(*overrides))
        result.append(jobs.gather_weights(engine))
        jobs.finish(engine)
    return result


@pytest.fixture(scope="module")
def weights() -> list[dict[str, Tensor]]:
    cases = [("train.seed=1",), ("train.seed=1", "model.num_layers=2"), ("train.seed=2",)]
    return run_ranks(1, initial_weights, [(*case, "zero.stage=0") for case in cases])[0]


def test_same_seed_and_name_give_the_same_weight(weights: list[dict[str, Tensor]]) -> None:
    """A model with fewer layers has the same weights under the same names: no draw depends on others."""
    deep, shallow, _ = weights
    for name, weight in shallow.items():
        if not name.endswith(("linear_proj.weight", "linear_fc2.weight")):  # their scale counts the layers
            assert torch.equal(weight, deep[name]), name


def test_other_seed_or_name_give_other_weights(weights: list[dict[str, Tensor]]) -> None:
    first, _, other_seed = weights
    qkv = "decoder.layers.{}.self_attention.linear_qkv.weight"
    assert not torch.equal(first[qkv.format(0)], other_seed[qkv.format(0)])
    assert not torch.equal(first[qkv.format(0)], first[qkv.format(1)])


def test_statistics(weights: list[dict[str, Tensor]]) -> None:
    for name, weight in weights[0].items():
        if name.endswith("layernorm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        std = 0.02
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * 4)
        # The standard error of a standard deviation of n draws is std / sqrt(2n); five of them.
        slack = 5 * std / math.sqrt(2 * weight.numel())
        assert weight.std().item() == pytest.approx(std, abs=slack), name
        assert weight.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(weight.numel())), name


def test_every_stage_and_number_of_ranks_start_alike(weights: list[dict[str, Tensor]]) -> None:
    cases = [(f"zero.stage={stage}", "train.seed=1") for stage in (0, 1, 2, 3)]
    for case, found in zip(cases, run_ranks(2, initial_weights, cases)[1], strict=True):
        for name, weight in weights[0].items():
            assert torch.equal(found[name], weight), f"{case}: {name}"

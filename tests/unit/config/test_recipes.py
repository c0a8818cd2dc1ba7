"""The complete jobs of conf/experiment: each composes, and those that name a machine fit it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distllm.config.cluster_schema import Cluster
from distllm.config.compose import load, parse
from distllm.config.problems import Problem, UserError
from distllm.data.tokenizer_training import byte_tokenizer
from distllm.layout.grid import Grid
from distllm.plan.memory import estimate_memory
from distllm.verbs.check import report, vocabulary_size

ROOT = Path(__file__).parents[3]
RECIPES = sorted(file.stem for file in ROOT.glob("conf/experiment/*.yaml"))
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("distllm/*/README.md"), *ROOT.glob("launch/*")])
GROUPS = sorted(
    f"{file.parent.name}={file.stem}"
    for file in ROOT.glob("conf/*/*.yaml")
    if file.parent.name != "experiment"
)
DEVICES = {"a100_40gb": 40e9, "a100_80gb": 80e9, "b200": 192e9, "h100_80gb": 80e9, "h200_141gb": 141e9}
GIB = 2**30


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe: str) -> None:
    config = load(parse("config", [f"+experiment={recipe}"]))
    # Else two recipes would resume each other's runs, or one those of the defaults.
    assert config.run.dir == f"runs/{recipe}"


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("bench_") or "gpus" in r])
def test_recipes_for_gpus_are_in_bf16(recipe: str) -> None:
    assert load(parse("config", [f"+experiment={recipe}"])).train.precision == "bf16"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_for_gpus_are_in_bf16(document: Path) -> None:
    """A shape of billions of parameters is not for processors."""
    lines = document.read_text().replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.search(r"\btrain\b.* model=llama3_", line)]
    assert [line for line in commands if "train.precision=bf16" not in line] == []


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [*((recipe, 64 if "64gpus" in recipe else 1) for recipe in RECIPES), ("laptop", 2), ("laptop", 4)],
)
def test_recipes_are_legal_and_fit(recipe: str, world_size: int) -> None:
    overrides = [f"+experiment={recipe}", f"world_size={world_size}"]
    if recipe == "laptop":
        overrides.append(f"train.micro_batch_size={16 // world_size}")
    config = load(parse("check", overrides))
    vocab_size = vocabulary_size(config.tokenizer)
    assert report(config, vocab_size, world_size).startswith("distllm check: legal\n")
    fullest = sum(estimate_memory(config, vocab_size, Grid.of(config.parallel, world_size)).values())
    # Of 80 GB the rest is for what the planner does not count: buffers, fragmentation, libraries.
    assert fullest < (GIB if recipe in ("quickstart", "laptop") else 70 * GIB)


def test_a_finished_tokenizer_takes_the_place_of_the_recipe_s(tmp_path: Path) -> None:
    byte_tokenizer([], "<|endoftext|>").save(tmp_path)
    own = ["tokenizer=huggingface", f"tokenizer.path={tmp_path}", "tokenizer.vocab_size=null"]
    config = load(parse("check", ["+experiment=llama3_8b_64gpus", "world_size=64", *own]))
    assert vocabulary_size(config.tokenizer) == 257


def problems_of(*overrides: str) -> list[Problem]:
    try:
        load(parse("config", overrides))
    except UserError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("choice", GROUPS)
def test_every_configuration_of_a_group_composes(choice: str) -> None:
    """But for what only the user knows, such as where the data is."""
    problems = problems_of(choice)
    assert [p.rule for p in problems] == [f"{p.setting} is required" for p in problems]
    assert not problems or choice.startswith(("data=", "tokenizer="))


def test_a_configuration_that_does_not_compose_is_seen() -> None:
    assert [p.setting for p in problems_of("cluster=h100")] == ["cluster"]


def test_every_device_is_there_and_none_is_the_default() -> None:
    assert {choice for choice in GROUPS if choice.startswith("cluster=")} == {
        f"cluster={name}" for name in (*DEVICES, "cpu", "none")
    }
    assert load(parse("config", [])).cluster == Cluster()


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_its_name_and_less_memory_than_is_sold(name: str) -> None:
    """A driver keeps some of it: 2 to 8%, since the 80 GB of an H100 are 80 GiB."""
    cluster = load(parse("config", [f"cluster={name}"])).cluster
    assert cluster.device == name
    assert cluster.memory_bytes
    assert 0.95 * DEVICES[name] < cluster.memory_bytes < 1.074 * DEVICES[name]


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if "gpus" in recipe or recipe.startswith("bench")]
)
def test_gpu_recipes_fit_a_device_of_80_gb(recipe: str) -> None:
    world_size = 64 if "64gpus" in recipe else 1
    load(parse("check", [f"+experiment={recipe}", f"world_size={world_size}", "cluster=h100_80gb"]))

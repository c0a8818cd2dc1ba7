"""Composition: every shipped configuration is sound, and a config has one hash and one text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.config import compose
from distllm.config.problems import UserError
from distllm.config.schema import Config

CONF = Path(__file__).parents[3] / "conf"
GROUP_OPTIONS = sorted(
    f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name != "experiment"
)


def load(*arguments: str) -> Config:
    return compose.load(compose.parse("train", arguments))


def needed_by(option: str, folder: Path) -> list[str]:
    """The settings without which a group option is incomplete, as `???` in its file says."""
    group, name = option.split("=")
    text = (CONF / group / f"{name}.yaml").read_text()
    (folder / "document.txt").write_text("text")
    if option == "data=mixture":
        return ["data.sources.a.source=text", f"data.sources.a.path={folder}/*.txt"]
    if option == "data=megatron":
        return ["tokenizer=bytes", f"data.path={folder}/*.txt"]
    return [f"{group}.path={folder}/*.txt" if group == "data" else f"{group}.path={folder}"] * ("???" in text)


@pytest.mark.parametrize("option", GROUP_OPTIONS)
def test_every_group_option_is_a_sound_job(option: str, tmp_path: Path) -> None:
    config = load(option, *needed_by(option, tmp_path))
    assert isinstance(config, Config)


def test_values_keep_their_types() -> None:
    config = load(
        "optimizer.lr=3e-4", "schedule.min_lr=0", "optimizer.betas=[0.8,0.9]", "model.head_dim=null"
    )
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.head_dim is None
    assert isinstance(config.schedule.min_lr, float)


def test_groups_of_a_folder_of_the_user_are_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [tiny]\nnum_layers: 3\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\ndefaults: [{override /model: mine}]\noptimizer: {lr: 2e-4}\n"
    )
    config = load(f"--config-dir={tmp_path}", "+experiment=own")
    assert (config.model.num_layers, config.model.hidden_size, config.optimizer.lr) == (3, 64, 2e-4)


def test_another_main_config_is_taken(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("defaults: [config, _self_]\ntrain: {steps: 7}\n")
    assert load(f"--config-dir={tmp_path}", "--config-name=other").train.steps == 7


def test_interpolations_are_resolved() -> None:
    config = load("run.dir='runs/${model.num_layers}-${hydra:runtime.choices.model}'", "model=tiny")
    assert config.run.dir == "runs/4-tiny"


def test_flags_may_stand_between_overrides() -> None:
    request = compose.parse("train", ["model=tiny", "-m", "train.seed=1,2"])
    assert request.is_sweep
    assert request.overrides == ("model=tiny", "train.seed=1,2")


def test_equal_jobs_have_equal_hashes_and_others_do_not() -> None:
    config = load("train.steps=5", "optimizer.lr=1e-3")
    assert compose.config_hash(config) == compose.config_hash(load("optimizer.lr=0.001", "train.steps=5"))
    assert compose.config_hash(config) != compose.config_hash(load("train.steps=5", "optimizer.lr=0.0011"))
    # Ranks of one job may run on different machines: the hash is a matter of the values alone.
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=5))
    assert compose.config_hash(again) == compose.config_hash(config)


def test_the_text_of_a_config_gives_it_back() -> None:
    config = load("tokenizer.special_tokens=['<|a|>','b: c']", "optimizer.lr=1e-7", "schedule.min_lr=0")
    text = compose.to_yaml(config)
    assert compose.from_yaml(text) == config
    assert compose.config_hash(compose.from_yaml(text)) == compose.config_hash(config)


@settings(deadline=None)
@given(prompt=st.text(st.characters(codec="utf-8")), rate=st.floats(min_value=1e-300, max_value=1e300))
def test_the_text_of_a_config_keeps_every_string_and_number(prompt: str, rate: float) -> None:
    config = dataclasses.replace(
        BASE,
        logging=dataclasses.replace(BASE.logging, sample_prompt=prompt),
        optimizer=dataclasses.replace(BASE.optimizer, lr=rate),
    )
    assert compose.from_yaml(compose.to_yaml(config)) == config


def test_a_section_named_by_a_word_of_python_is_written_as_users_write_it() -> None:
    config = load("import.path=folder")
    assert config.import_.path == "folder"
    assert compose.to_plain(config)["import"] == {"path": "folder"}
    assert "import_" not in compose.to_plain(config)
    assert "\nimport:\n  path: folder\n" in compose.to_yaml(config)
    assert compose.config_hash(config) != compose.config_hash(BASE)
    with pytest.raises(
        UserError, match=r"import_=.*\n    rule: is not a setting of distllm\n    fix:  did you mean import"
    ):
        load("import_.path=folder")
    with pytest.raises(UserError, match="import_"):
        compose.from_yaml(compose.to_yaml(config).replace("\nimport:", "\nimport_:"))


def test_a_spoilt_text_is_the_users_mistake() -> None:
    text = compose.to_yaml(BASE).replace("steps: 1000", "steps: many")
    with pytest.raises(UserError, match=r"train\.steps=many"):
        compose.from_yaml(text)


def test_the_overrides_of_a_sweep_make_every_combination() -> None:
    request = compose.parse(
        "train", ["-m", "model=tiny,quickstart", "train.seed=range(1,3)", "train.steps=5"]
    )
    assert [swept for _, swept in compose.expand(request)] == [
        "model=tiny,train.seed=1",
        "model=tiny,train.seed=2",
        "model=quickstart,train.seed=1",
        "model=quickstart,train.seed=2",
    ]


@pytest.mark.parametrize("value", ["runs/plain", "a b", "it's", 'a "quote"', "back\\", "a,b=[c]{d}", "${x}"])
def test_an_assignment_gives_exactly_its_value(value: str) -> None:
    escaped = value.replace("${", "\\${")
    assert load(compose.assignment("logging.sample_prompt", escaped)).logging.sample_prompt == value


BASE = load()


def test_actions_and_bare_arguments_are_no_overrides() -> None:
    request = compose.parse("data", ["merge", "shard=1/4", "train.steps=5"])
    assert (request.action, request.arguments) == ("merge", {"shard": "1/4"})
    assert request.overrides == ("train.steps=5",)
    assert request.words == ["merge", "shard=1/4"]
    assert compose.parse("data", ["train.steps=5"]).action is None
    assert compose.parse("train", ["shard=1/4"]).overrides == ("shard=1/4",)

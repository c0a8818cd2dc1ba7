"""Every kind of mistake on the command line, and all of them in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from distllm.config import compose
from distllm.config.problems import Problem, UserError


def problems_of(*arguments: str, verb: str = "train") -> list[Problem]:
    with pytest.raises(UserError) as caught:
        compose.load(compose.parse(verb, arguments))
    return list(caught.value.problems)


# What is written, the setting that is named, a part of the rule, a part of the fix.
MISTAKES = {
    "unknown setting": ("train.step=5", "train.step", "not a setting", "did you mean train.steps"),
    "unknown setting of another section": (
        "optimizer.min_lr=0",
        "optimizer.min_lr",
        "not",
        "schedule.min_lr",
    ),
    "unlike any setting": ("fault.xyz=1", "fault.xyz", "not a setting", "there are: fault.hang_seconds"),
    "unknown section": ("modl=tiny", "modl", "not a setting", "did you mean model?"),
    "added setting": ("+train.stops=5", "train.stops", "not a setting", "train.steps"),
    "forced setting": ("++train.stops=5", "train.stops", "not a setting", "train.steps"),
    "unknown group option": ("model=tny", "model", "must be one of gpt2_124m,", "model=tiny"),
    "unknown experiment": ("+experiment=quikstart", "experiment", "must be one of", "+experiment=quickstart"),
    "experiment without a plus": ("experiment=quickstart", "experiment", "+", "+experiment=quickstart"),
    "group option with a plus": ("+model=tiny", "+model", "Multiple values for model", "model=tiny"),
    "number for a section": ("run=5", "run", "is a section of settings", "run.NAME=VALUE"),
    "number for a group": ("model=5", "model", "", ""),
    "float for an integer": ("train.steps=1e3", "train.steps", "valid integer", "train.steps=1000"),
    "text for an integer": ("train.steps=many", "train.steps", "valid integer", "train.steps=1000"),
    "truth for an integer": ("train.seed=true", "train.seed", "valid integer", "train.seed=1234"),
    "nothing for an integer": ("train.steps=", "train.steps", "valid integer", "train.steps=1000"),
    "null where it means nothing": ("train.steps=null", "train.steps", "valid integer", "train.steps=1000"),
    "text where null is meant": ("model.head_dim=none", "model.head_dim", "integer, or null", "=null"),
    "number for a text": ("data.text_field=5", "data.text_field", "valid string", "data.text_field=\"'5'\""),
    "text for a truth": ("logging.wandb=perhaps", "logging.wandb", "valid boolean", "logging.wandb=false"),
    "out of range": ("fault.hang_seconds=0", "fault.hang_seconds", "greater than 0", "=600"),
    "not a number": ("optimizer.lr=nan", "optimizer.lr", "must be", "optimizer.lr=0.0003"),
    "infinite": ("optimizer.lr=inf", "optimizer.lr", "must be a finite number", "optimizer.lr=0.0003"),
    "too long": ("optimizer.betas=[1,2,3]", "optimizer.betas", "at most 2 items, not 3", "[0.9, 0.95]"),
    "too short": ("optimizer.betas=[0.9]", "optimizer.betas.1", "is required", "optimizer.betas.1"),
    "one of a list": ("tokenizer.special_tokens=[1]", "tokenizer.special_tokens.0", "valid string", ""),
    "unknown choice": ("train.precision=bf61", "train.precision", "'fp32' or 'bf16'", "train.precision=bf16"),
    "unknown stage": ("zero.stage=4", "zero.stage", "must be 0, 1, 2 or 3", "zero.stage=1"),
    "mandatory": ("data=text", "data.path", "data.path is required", "add data.path=VALUE"),
    "deleted setting": (
        "~optimizer.lr",
        "optimizer.lr",
        "optimizer.lr is required",
        "add optimizer.lr=VALUE",
    ),
    "deleted section": ("~fault", "fault", "fault is required", "fault=NAME"),
    "deletion of nothing": ("~optimizer.lrr", "~optimizer.lrr", "does not exist", "--cfg job"),
    "interpolation": ("run.dir=${nothing}", "run.dir", "'nothing' not found", "name a setting that exists"),
    "no value": ("train.steps", "override", "must be written SETTING=VALUE", "quote"),
    "no name": ("=3", "override", "must be written SETTING=VALUE", "quote"),
    "open quote": ("run.dir='a", "override", "must be written SETTING=VALUE", "quote"),
    "sweep without -m": ("train.seed=1,2", "train.seed", "several values need a sweep", "add -m"),
    "unknown Hydra setting": ("hydra.foo=1", "hydra.foo", "Could not override", "--cfg job"),
    "missing main config": ("--config-name=none", "--config-name", "none", "--config-name"),
    "missing config folder": ("--config-dir=/nowhere", "--config-dir", "must be a folder", "folder"),
    "unknown flag": ("--stepz=3", "arguments", "unrecognized arguments: --stepz=3", "--help"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_its_rule_and_fix(kind: str) -> None:
    written, setting, rule, fix = MISTAKES[kind]
    (problem,) = problems_of(written)
    assert problem.setting == setting
    assert rule in problem.rule
    assert fix in problem.fix
    assert "\n" not in f"{problem.rule}{problem.fix}"


def test_all_problems_are_in_one_message() -> None:
    arguments = [written for written, *_ in MISTAKES.values() if not written.startswith(("-", "~", "run"))]
    arguments = [written for written in arguments if written not in ("train.steps=1e3", "train.steps=")]
    with pytest.raises(UserError) as caught:
        compose.load(
            compose.parse("train", [*arguments, "parallel.loss_as_layer=true", "model.num_attention_heads=7"])
        )
    text = str(caught.value)
    assert text.startswith(f"{len(caught.value.problems)} problems with this job:\n  1. ")
    expected = {"train.step", "modl", "model", "experiment", "train.seed", "fault.hang_seconds", "zero.stage"}
    expected |= {"data.path", "override", "parallel.loss_as_layer", "hydra.foo", "optimizer.betas.1"}
    assert expected <= {problem.setting for problem in caught.value.problems}


def test_rules_speak_beside_a_wrong_type_but_not_about_it() -> None:
    problems = problems_of(
        "train.steps=many", "train.global_batch_size=5", "schedule=wsd", "schedule.decay_steps=9"
    )
    assert [problem.setting for problem in problems] == ["train.steps", "train.global_batch_size"]


def test_a_wrong_group_option_makes_no_further_problems() -> None:
    (problem,) = problems_of("data=txt", "data.path=/nowhere/*.txt")
    assert problem.setting == "data"


def test_the_environment_is_judged_too(tmp_path: Path) -> None:
    settings = [
        "data=text",
        f"data.path={tmp_path}/*.txt",
        "checkpoint.resume=/nowhere",
        "run.dir=/dev/null/run",
    ]
    problems = problems_of(*settings, "tokenizer.path=/nowhere")
    assert [problem.setting for problem in problems] == [
        "data.path",
        "tokenizer.path",
        "checkpoint.resume",
        "run.dir",
    ]


def test_only_what_a_verb_uses_is_judged() -> None:
    assert compose.load(compose.parse("data", ["train.global_batch_size=5"])).train.global_batch_size == 5
    assert problems_of("train.global_batch_size=5")


def test_the_world_size_comes_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    (problem,) = problems_of()
    assert problem.setting == "train.global_batch_size"
    assert problem.fix == "train.global_batch_size=12 or train.global_batch_size=24"


def test_a_message_is_written_as_the_command_line_is() -> None:
    assert str(UserError([Problem("a.b", None, "must be true", "a.b=true")])) == (
        "1 problem with this job:\n  1. a.b=null\n    rule: must be true\n    fix:  a.b=true"
    )
    assert str(Problem("a.b", False, "r", "f")).startswith("a.b=false\n")
    assert str(Problem("a.b", 0, "r", "f")).startswith("a.b=0\n")

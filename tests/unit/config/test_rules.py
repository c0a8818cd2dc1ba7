"""Each rule that joins several settings: broken, it names setting, rule and a fix that keeps it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

from distllm.config import compose, rules
from distllm.config.problems import Problem, UserError

ROOT = Path(__file__).parents[3]


def problems_of(*overrides: str, world_size: int = 1) -> list[Problem]:
    """What the whole command says, as rules are only worth what reaches the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world_size))
        try:
            compose.load(compose.parse("train", overrides))
        except UserError as error:
            return list(error.problems)
    return []


# The overrides that break a rule, the setting that is named, a part of the rule, the overrides that keep it.
BROKEN = {
    "hidden size": ("model.num_attention_heads=12", "model.hidden_size", "=12", "model.hidden_size=240"),
    "query groups": ("model.num_query_groups=5", "model.num_query_groups", "=8", "model.num_query_groups=4"),
    "rotary width": ("model.head_dim=33", "model.head_dim", "must be even", "model.head_dim=34"),
    "constant decays": (
        "schedule=constant schedule.decay_steps=5",
        "schedule.decay_steps",
        "must be null",
        "schedule.decay_steps=null",
    ),
    "constant has a minimum": (
        "schedule=constant schedule.min_lr=1e-5",
        "schedule.min_lr",
        "must be 0",
        "schedule.min_lr=0",
    ),
    "decay is too long": (
        "schedule=wsd schedule.decay_steps=950",
        "schedule.decay_steps",
        "schedule.warmup_steps=100 in train.steps=1000",
        "schedule.decay_steps=900",
    ),
    "minimum above peak": (
        "optimizer.lr=1e-5",
        "schedule.min_lr",
        "above optimizer.lr=1e-05",
        "schedule.min_lr=1e-06",
    ),
    "nothing to validate on": (
        "data.validation_fraction=0",
        "train.validation_interval",
        "holds out no documents",
        "train.validation_interval=0",
    ),
    "bf16 sums of fp32 gradients": (
        "train.gradient_accumulation=bf16",
        "train.gradient_accumulation",
        "must be fp32 for train.precision=fp32",
        "train.precision=bf16",
    ),
    "path for stdlib": ("data.path=/", "data.path", "must be null for data.source=stdlib", "data.path=null"),
    "no path for text": ("data=text data.path=null", "data.path", "is required", "data.path={conf}/*.yaml"),
    "no file matches": (
        "data=text data.path=/x/*",
        "data.path",
        "must match files",
        "data.path={conf}/*.yaml",
    ),
    "path for bytes": (
        "tokenizer=bytes tokenizer.path=/",
        "tokenizer.path",
        "must be null",
        "tokenizer.path=null",
    ),
    "no path for huggingface": (
        "tokenizer=huggingface tokenizer.path=null",
        "tokenizer.path",
        "is required",
        "tokenizer.path={conf}",
    ),
    "no tokenizer there": ("tokenizer.path=/x", "tokenizer.path", "tokenizer.json", "tokenizer.path={conf}"),
    "bytes have their number": (
        "tokenizer=bytes tokenizer.special_tokens=[a] tokenizer.vocab_size=257",
        "tokenizer.vocab_size",
        "must be null or 258",
        "tokenizer.vocab_size=258",
    ),
    "huggingface has its number": (
        "tokenizer=huggingface tokenizer.path={conf} tokenizer.vocab_size=300",
        "tokenizer.vocab_size",
        "must be null",
        "tokenizer.vocab_size=null",
    ),
    "bpe needs a size": (
        "tokenizer.vocab_size=null",
        "tokenizer.vocab_size",
        "must be at least 257",
        "tokenizer.vocab_size=257",
    ),
    "bpe below the bytes": (
        "tokenizer.vocab_size=200",
        "tokenizer.vocab_size",
        "must be at least 257",
        "tokenizer.path={conf}",
    ),
    "special token twice": (
        "tokenizer.special_tokens=[a,a]",
        "tokenizer.special_tokens",
        "distinct",
        "tokenizer.special_tokens=[a]",
    ),
    "special token ends documents": (
        "tokenizer.special_tokens=[a] tokenizer.end_of_document=a",
        "tokenizer.special_tokens",
        "without the end of a document a",
        "tokenizer.special_tokens=[]",
    ),
    "no end of document": (
        "tokenizer.end_of_document=",
        "tokenizer.end_of_document",
        "must not be empty",
        "tokenizer.end_of_document=x",
    ),
    "no checkpoint there": (
        "checkpoint.resume=/x",
        "checkpoint.resume",
        "auto, never or the folder",
        "checkpoint.resume={conf}",
    ),
    "run directory under a file": (
        "run.dir={conf}/config.yaml/run",
        "run.dir",
        "is not a folder",
        "run.dir=runs",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_rule_is_named_and_kept_again(kind: str) -> None:
    breaking, setting, rule, keeping = BROKEN[kind]
    overrides = breaking.format(conf=ROOT / "conf").split()
    named = {problem.setting: problem for problem in problems_of(*overrides)}
    assert setting in named
    assert set(named) == {setting}
    assert rule in named[setting].rule
    assert named[setting].fix
    assert problems_of(*overrides, keeping.format(conf=ROOT / "conf")) == []


def test_an_absent_wandb_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (problem,) = problems_of("logging.wandb=true")
    assert (problem.setting, problem.fix) == (
        "logging.wandb",
        "pip install 'distllm[wandb]', or logging.wandb=false",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert problems_of("logging.wandb=true") == []


def test_a_run_may_be_shorter_than_its_warm_up() -> None:
    """The first steps of a longer schedule are a job too: `launch/quickstart train.steps=20`."""
    assert problems_of("train.steps=20") == []


@pytest.mark.parametrize(("installed", "is_old"), [("2.10.1", True), ("1.13", True), ("2.11.0+cpu", False)])
def test_an_old_torch_is_refused(installed: str, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: installed if name == "torch" else real(name)
    )
    problems = problems_of()
    assert len(problems) == is_old
    for problem in problems:
        assert (problem.setting, problem.value, problem.rule) == ("torch", installed, "must be at least 2.11")
        assert "pip install 'torch>=2.11" in problem.fix


def test_an_absent_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert [problem.value for problem in problems_of()] == ["not installed"] * 3


@pytest.mark.parametrize(("package", "tested"), rules.TESTED_VERSIONS.items())
@pytest.mark.parametrize("other", ["0.1.0", "99.0"])
def test_untested_versions_are_refused(
    package: str, tested: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: other if name == package else real(name))
    (problem,) = problems_of()
    assert (problem.setting, problem.value) == (package, other)
    assert tested in problem.rule
    assert problem.fix == f"pip install '{package}=={tested}'"


def test_the_supported_torch_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rules.SUPPORTED_TORCH in project["dependencies"]
    for package, tested in rules.TESTED_VERSIONS.items():
        assert f"{package}=={tested}" in project["dependencies"]
    assert rules.SUPPORTED_TORCH.startswith("torch>={}.{},".format(*rules.OLDEST_TORCH))

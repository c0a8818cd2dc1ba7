"""A verb that distllm knows nothing of: a module that DISTLLM_PLUGINS names, and that registers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import start

PACKAGE = Path(__file__).parents[2] / "distllm"
GREET = '''
"""`distllm greet [who=NAME]`: a greeting for every step."""

import logging

from distllm.config.compose import Request
from distllm.config.problems import Problem
from distllm.config.schema import Config
from distllm.config.verbs import Verb, register

assert logging.getLogger("DeepSpeed").level == logging.ERROR, "silenced before a plugin may import it"


def few_steps(config, world_size):
    if config.train.steps > 10:
        yield Problem("train.steps", config.train.steps, "must not tire anybody", "train.steps=10")


def run(config: Config, request: Request) -> int:
    print(" ".join(["hello", request.arguments.get("who", "world")] * config.train.steps))
    return 5


register(Verb("greet", "say hello once a step", __name__, bare_arguments=("who",), rules=(few_steps,)))
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "greeting.py").write_text(GREET)
    monkeypatch.setenv("DISTLLM_PLUGINS", "greeting")
    return tmp_path


def test_a_verb_registers_itself(folder: Path) -> None:
    result = start(folder, "greet", "who=Ada", "train.steps=2")
    assert (result.exit_code, result.stdout, result.stderr) == (5, "hello Ada hello Ada\n", "")
    assert "\n  greet       say hello once a step\n" in start(folder, "--help").stdout
    assert start(folder, "greet", "--help").stdout.startswith("distllm greet: say hello once a step\n")
    refused = start(folder, "greet")
    assert refused.exit_code == 2
    assert "train.steps=1000\n    rule: must not tire anybody\n    fix:  train.steps=10" in refused.stderr
    fix = "fix:  distllm greet\n"
    assert start(folder, "great").stderr.endswith(fix)
    assert [file for file in PACKAGE.rglob("*.py") if "greet" in file.read_text()] == []


def test_a_job_of_a_sweep_finds_the_verb(folder: Path) -> None:
    result = start(folder, "greet", "-m", "who=Ada", "train.steps=1,2", "run.dir=runs")
    assert result.exit_code == 5
    assert [line for line in result.stdout.splitlines() if line.startswith("hello")] == [
        "hello Ada",
        "hello Ada hello Ada",
    ]


def test_without_the_plugin_there_is_no_such_verb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTLLM_PLUGINS")
    result = start(folder, "greet", "train.steps=2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "verb=greet\n    rule: must be one of train, check," in result.stderr


def test_all_plugins_that_cannot_be_imported_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    monkeypatch.setenv("DISTLLM_PLUGINS", "greeting, no_such_module,broken,")
    for arguments in (["train", "train.steps=1"], ["--help"]):
        result = start(folder, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "distllm: 2 problems with this job:\n"
            "  1. DISTLLM_PLUGINS=no_such_module\n"
            "    rule: must be modules that can be imported: ModuleNotFoundError: "
            "No module named 'no_such_module'\n"
            "    fix:  put its folder on PYTHONPATH, or see what python -c 'import no_such_module' says\n"
            "  2. DISTLLM_PLUGINS=broken\n"
            "    rule: must be modules that can be imported: ZeroDivisionError: division by zero\n"
            "    fix:  put its folder on PYTHONPATH, or see what python -c 'import broken' says\n"
        )

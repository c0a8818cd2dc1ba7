"""Every action of `distllm bench` is a module that can be called, with what it needs of the command line."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distllm.bench.report import Report
from distllm.config import compose
from distllm.config.schema import Config
from distllm.config.verbs import VERBS
from distllm.verbs import bench

ACTIONS = VERBS["bench"].actions


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_has_its_module(action: str) -> None:
    first, second, *others = inspect.signature(
        importlib.import_module(f"distllm.bench.{action}").run
    ).parameters.values()
    assert [first.name, second.name] == ["config", "vocab_size"]
    assert all(parameter.default is not parameter.empty for parameter in others)


@pytest.mark.parametrize("action", ["layouts", "startup"])
def test_an_action_gets_what_the_command_says(
    action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def run(config: Config, vocab_size: int, **more: Any) -> Report:
        seen.extend([config.bench.steps, vocab_size, more])
        return Report("a table", {"a": 1})

    monkeypatch.setitem(sys.modules, f"distllm.bench.{action}", SimpleNamespace(run=run))
    overrides = ["model=tiny", "tokenizer=bytes", "bench.steps=7", f"bench.json={tmp_path}/out.json"]
    request = compose.parse("bench", [action, *overrides])
    assert bench.run(compose.load(request), request) == 0
    assert seen[:2] == [7, 257]
    given = seen[2].get("overrides", ())
    # A start is measured with the configuration composed anew by every rank, from the same words.
    assert [text for text in given if not text.startswith("--")] == (overrides if action == "startup" else [])
    assert capsys.readouterr().out == "a table\n"
    assert (tmp_path / "out.json").exists()

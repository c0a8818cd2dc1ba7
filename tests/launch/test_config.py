"""`distllm config` as its users start it: what the settings mean, in the width of the terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import Finished, start

from distllm.config.validate import SECTIONS, SETTINGS


def shown(folder: Path, *arguments: str) -> str:
    result = start(folder, "config", *arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


@pytest.mark.parametrize("columns", [70, 100])
def test_all_settings_are_shown_in_the_width_of_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(tmp_path)
    assert re.findall(r"^  ((?:\w+\.)\w+)  ", text, re.MULTILINE) == list(SETTINGS)
    assert re.findall(r"^(\w+)(?:=.*)?$", text, re.MULTILINE)[:3] == list(SECTIONS)[:3]
    assert columns - 15 < max(map(len, text.splitlines())) <= columns


def test_a_group_is_shown_with_what_the_overrides_make_of_it(tmp_path: Path) -> None:
    text = shown(tmp_path, "model", "model=llama3_8b", "model.seq_length=4096")
    heading, summary, empty, name, meaning = text.splitlines()[:5]
    others = "gpt2_124m, llama3_405b, llama3_70b, quickstart, tiny"
    assert heading == f"model=llama3_8b; there are also {others}"
    assert summary == "  Shape of the transformer; the vocabulary comes from the tokenizer."
    assert (empty, name) == ("", "  model.name                 llama3_8b  text")
    assert meaning == "      the model's name in summaries"
    assert "\n  model.seq_length           4096       integer > 0\n" in text
    assert "\n  model.normalization        rmsnorm    rmsnorm | layernorm\n" in text
    assert "\n  train." not in text


def test_one_setting_is_shown_alone(tmp_path: Path) -> None:
    assert shown(tmp_path, "train.steps", "train.steps=7") == (
        "  train.steps  7  integer > 0\n      optimizer updates in all\n"
    )
    path = f"{tmp_path}/{'long/' * 20}x.txt"
    kind, place = shown(tmp_path, "data.path", "data=text", f"data.path={path}").splitlines()[1::-1]
    assert (place, kind) == (f"  data.path  {path}", "             text or null")


def test_what_is_below_a_name_of_the_users_own_is_shown(tmp_path: Path) -> None:
    text = shown(tmp_path, "data.sources.NAME")
    assert re.match(r"  data\.sources\.NAME\.source +required +text \| jsonl", text)
    assert re.search(r"\n  data\.sources\.NAME\.weight +1\.0 +number >= 0\n", text)


def refused(folder: Path, *arguments: str) -> Finished:
    result = start(folder, "config", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result


def test_mistakes_are_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, "trian").stderr
    assert message.startswith("distllm: 1 problem with this job:\n  1. group or setting=trian\n")
    assert message.endswith("fix:  distllm config train\n")
    assert refused(tmp_path, "train.stepz").stderr.endswith("fix:  distllm config train.steps\n")
    assert "did you mean train.steps?" in refused(tmp_path, "train", "train.step=5").stderr

"""What the settings of the data path get wrong, each with the setting that is to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from distllm.config import compose
from distllm.config.problems import UserError
from distllm.config.schema import Config

TWICE = "data.changes=[{step: 1, weights: {code: 1, web: 0}}, {step: 1, weights: {code: 0, web: 1}}]"
SOURCES = ("data=mixture", "data.sources.code.source=stdlib", "data.sources.web.source=stdlib")


def load(*overrides: str) -> Config:
    return compose.load(compose.parse("train", overrides))


def refused(*overrides: str) -> dict[str, str]:
    """{setting: rule} of all problems."""
    with pytest.raises(UserError) as caught:
        load(*overrides)
    return {problem.setting: problem.rule for problem in caught.value.problems}


def test_a_plain_job_is_a_mixture_of_one() -> None:
    data = load("data=stdlib", "data.max_epochs=3", "data.shuffle=false").data
    (name, source), *others = data.named_sources.items()
    assert (name, source.max_epochs, source.shuffle, others) == ("stdlib", 3, False, [])
    assert data.weights_at(0) == {"stdlib": 1}


def test_weights_change_at_their_steps_in_whatever_order_they_are_written() -> None:
    changes = (
        "data.changes=[{step: 20, weights: {code: 0, web: 1}}, {step: 10, weights: {code: 5.0, web: 2}}]"
    )
    data = load(*SOURCES, "data.sources.web.weight=3", changes).data
    weights = [data.weights_at(step) for step in (0, 9, 10, 19, 20, 1000)]
    first, second, third = {"code": 1, "web": 3}, {"code": 5, "web": 2}, {"code": 0, "web": 1}
    assert weights == [first, first, second, second, third, third]


@pytest.mark.parametrize(
    ("overrides", "setting", "rule"),
    [
        (["data=mixture"], "data.sources", "a mixture needs a source"),
        ([*SOURCES, "data.path=x"], "data.path", "every source has its own"),
        ([*SOURCES, "data.max_epochs=2"], "data.max_epochs", "every source has its own"),
        ([*SOURCES, "data.sources.code.path=x"], "data.sources.code.path", "must be null"),
        ([*SOURCES, "data.sources.web.source=jsonl"], "data.sources.web.path", "is required"),
        ([*SOURCES, "data.sources.web.source=jsonl", "data.sources.web.path=nothing*"],
         "data.sources.web.path", "must match files"),
        ([*SOURCES, "data.sources.web.source=json"], "data.sources.web.source", "must be"),
        ([*SOURCES, "data.sources.web.weight=-1"], "data.sources.web.weight", "greater than or equal to 0"),
        ([*SOURCES, "data.sources.web.wait=1"], "data.sources.web.wait", "is not a setting"),
        ([*SOURCES, "data.sources.code.weight=0", "data.sources.web.weight=0"], "data.sources", "above 0"),
        ([*SOURCES, "data.sources.web.max_epochs=0"], "data.sources.web.max_epochs", "greater than 0"),
        ([*SOURCES, "data.changes=[{step: 1, weights: {code: 1}}]"], "data.changes.0", "name every source"),
        ([*SOURCES, "data.changes=[{step: 0, weights: {code: 1, web: 1}}]"], "data.changes.0.step", "than 0"),
        ([*SOURCES, "data.changes=[{step: 1, weights: {code: 0, web: 0}}]"], "data.changes.0", "above 0"),
        ([*SOURCES, TWICE], "data.changes.1.step", "another change"),
        (["data.changes=[{step: 1, weights: {stdlib: 1}}]"], "data.changes", "belongs to data.source=mix"),
        (["data=huggingface"], "data.path", "is required"),
        (["sequences=best_fit", "sequences.packing=worst_fit"], "sequences.packing", "must be"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(overrides: list[str], setting: str, rule: str) -> None:
    problems = refused(*overrides)
    assert setting in problems, problems
    assert rule in problems[setting]


def test_a_name_that_no_metric_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own.yaml").write_text("defaults: [mixture]\nsources:\n  'a/b': {source: stdlib}\n")
    assert "names metrics" in refused(f"--config-dir={tmp_path}", "data=own")["data.sources"]


def test_no_bpe_is_trained_on_tokens(tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    assert "cannot be trained" in refused("data=megatron", f"data.path={tmp_path}/x.bin")["tokenizer.kind"]

"""A world of another size: another layout where that is wanted, the refusal where it is not."""

from __future__ import annotations

import pytest
from jobs import SMALL_JOB

from distllm.config import compose, rules
from distllm.config.problems import UserError
from distllm.config.schema import Config
from distllm.plan.replan import replanned


def on(world_size: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    request = compose.parse("train", [*SMALL_JOB, "parallel.tensor=2", "parallel.pipeline=2", *overrides])
    try:
        return compose.load(request)
    except UserError as error:
        return replanned(error, request)


def degrees(config: Config) -> tuple[int, int]:
    return config.parallel.tensor, config.parallel.pipeline


def test_the_nearest_layout_with_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLLM_ELASTIC", "1")
    whole = on(4, monkeypatch)
    assert (degrees(whole), whole.fault.replanned) == ((2, 2), None)
    for world_size in (1, 2, 3):
        config = on(world_size, monkeypatch)
        assert world_size % (degrees(config)[0] * degrees(config)[1]) == 0
        assert config.train.global_batch_size == whole.train.global_batch_size
        assert config.fault.replanned is not None
        assert config.fault.replanned.startswith(f"{world_size} rank")
        assert "must be a multiple of parallel.tensor x parallel.pipeline = 4" in config.fault.replanned
    assert degrees(on(8, monkeypatch)) == (2, 2), "grown by data parallelism"


def test_without_the_wish_it_stays_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTLLM_ELASTIC", raising=False)
    with pytest.raises(UserError, match="world size=2"):
        on(2, monkeypatch)
    assert on(2, monkeypatch, "fault.replan=true").fault.replanned
    monkeypatch.setenv("DISTLLM_ELASTIC", "1")
    with pytest.raises(UserError, match="world size=2"):
        on(2, monkeypatch, "fault.replan=false")


def test_other_mistakes_are_not_planned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLLM_ELASTIC", "1")
    with pytest.raises(UserError, match=r"train\.steps"):
        on(2, monkeypatch, "train.steps=1e3")
    with pytest.raises(UserError, match="hidden_size"):
        on(2, monkeypatch, "model.hidden_size=63")
    # Left out of what is composed: a job without it is another job.
    with pytest.raises(UserError, match="must be written SETTING=VALUE"):
        on(2, monkeypatch, "train.seed")
    monkeypatch.setattr(rules, "OLDEST_TORCH", (99, 0))
    with pytest.raises(UserError, match="must be at least 99"):
        on(2, monkeypatch)

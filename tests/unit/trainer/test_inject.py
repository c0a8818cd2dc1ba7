"""Faults on purpose strike where and as often as they say."""

from __future__ import annotations

import math

import pytest

from distllm.config.problems import UserError
from distllm.trainer.inject import Injector, parse


def strikes(text: str, rank: int, steps: int = 4) -> list[int]:
    injection = parse(text)
    return [step for step in range(steps) if injection.strikes(rank, step, range(8 * step, 8 * step + 8))]


def test_where_and_how_often() -> None:
    assert strikes("nan:step=2,rank=1", rank=1) == [2]
    assert strikes("nan:step=2,rank=1", rank=0) == []
    assert strikes("nan:sample=17", rank=0) == [2]
    assert strikes("nan", rank=5) == [0]
    assert strikes("nan:times=2", rank=5) == [0, 1]
    assert strikes("nan:times=0", rank=5) == [0, 1, 2, 3]


def test_factors() -> None:
    assert Injector([], 0).before_step(0, range(8)) is None
    assert Injector(["spike:factor=7.5"], 0).before_step(0, range(8)) == 7.5
    factor = Injector(["nan"], 0).before_step(0, range(8))
    assert factor is not None
    assert math.isnan(factor)
    with pytest.raises(RuntimeError, match="injected"):
        Injector(["error:step=1"], 0).before_step(1, range(8, 16))


@pytest.mark.parametrize("text", ["", "flood", "nan:where=3", "nan:step", "nan:step=x"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"fault\.inject"):
        parse(text)

"""What an optimizer asks of ZeRO is a rule of the layout, so the nearest layouts keep it, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distllm.config import compose
from distllm.config.problems import UserError
from distllm.config.registry import OPTIMIZERS
from distllm.optimizers.adamw import AdamW
from distllm.plan.nearest import nearest_layouts


class WholeMatrices(AdamW):
    needs_whole_matrices = True


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    OPTIMIZERS.register("whole", WholeMatrices())
    yield
    del OPTIMIZERS._parts["whole"]


def test_zero_must_not_cut_the_matrices_of_an_optimizer_that_needs_them_whole() -> None:
    arguments = ("optimizer.kind=whole", "zero.stage=2", "world_size=4")
    with pytest.raises(UserError) as refusal:
        compose.load(compose.parse("check", arguments))
    (problem,) = refusal.value.problems
    assert (problem.setting, problem.fix) == ("zero.stage", "zero.stage=0")
    assert refusal.value.config is not None
    assert nearest_layouts(refusal.value.config, 4)[0].changes == {"zero.stage": 0}
    compose.load(compose.parse("check", ("optimizer.kind=whole", problem.fix, "world_size=4")))

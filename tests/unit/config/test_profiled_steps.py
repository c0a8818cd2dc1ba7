"""Which steps `train.profile` names."""

import re

import pytest

from distllm.config.profile import profiled_steps


def test_a_window_is_from_its_first_step_to_before_its_end() -> None:
    assert list(profiled_steps("3:5")) == [3, 4]
    assert list(profiled_steps("1:2")) == [1]
    assert list(profiled_steps(None)) == []


@pytest.mark.parametrize(
    "text", ["", "3", "3:", ":5", "0:5", "5:5", "5:3", "-1:3", "3:5:7", "a:b", "3.0:5", " 3:5"]
)
def test_what_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        profiled_steps(text)

"""Which cases of a long matrix run by day, in `.ci/run`, and which at night, before a release (`nightly`).

@pytest.mark.parametrize("part", DAY_AND_NIGHT)
def test_...(part: int) -> None:
    cases = ... if (row + column) % 2 == part      # by day every row and every column is seen
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

DAY, NIGHT = 0, 1
DAY_AND_NIGHT = [pytest.param(DAY, id="day"), pytest.param(NIGHT, id="night", marks=pytest.mark.nightly)]


def every_second(cases: Iterable[Any]) -> list[Any]:
    """Cases to parametrize with: the second, fourth and so on at night. Tuples become several arguments."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = (), pytest.mark.nightly
    return [pytest.param(*case, marks=marks[index % 2]) for index, case in enumerate(values)]


def at_night(names: Iterable[str], nightly: Iterable[str]) -> list[Any]:
    """Names to parametrize with: those of `nightly` at night."""
    late = set(nightly)
    return [pytest.param(name, marks=pytest.mark.nightly if name in late else ()) for name in names]

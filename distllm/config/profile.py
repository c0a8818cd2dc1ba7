"""Parse `train.profile`, the steps to profile. Pure."""

from __future__ import annotations

import re


def profiled_steps(text: str | None) -> range:
    """Return the steps of a text: `3:5` names steps 3 and 4, as `step` in metrics.jsonl counts them.

    1 is the first update of a run. None names none. ValueError for a text that is not START:STOP with 0 <
    START < STOP.
    """
    if text is None:
        return range(0)
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    if not numbers or not 0 < int(numbers[1]) < int(numbers[2]):
        raise ValueError(text)
    return range(int(numbers[1]), int(numbers[2]))

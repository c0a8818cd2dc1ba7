"""Who is to blame for a hang, and who is slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distllm.runtime.diagnosis import judge, stragglers
from distllm.runtime.heartbeat import Beat

WAITING = Beat(0, 10, "host", 0.0, 5, 1, (40, 48), "train", 9.0, "all_reduce", 0.1)


def beats(*changes: Mapping[str, Any]) -> dict[int, Beat]:
    return {rank: replace(WAITING, rank=rank, **change) for rank, change in enumerate(changes)}


FRESH = dict.fromkeys(range(4), 1.0)


def test_verdicts() -> None:
    all_wait = beats({}, {}, {}, {})
    assert judge(all_wait, FRESH, 4).suspects == ()
    assert "network" in judge(all_wait, FRESH, 4).reason
    # Without a sign of life comes before everything else.
    stuck = beats({}, {"collective": None}, {}, {})
    assert judge(stuck, FRESH | {3: 20.0}, 4).suspects == (3,)
    assert judge(stuck, {0: 1.0, 1: 1.0, 2: 1.0}, 4).suspects == (3,), "never seen"
    assert judge(stuck, FRESH, 4).suspects == (1,)
    nobody_waits = beats({"collective": None}, {"collective": None})
    assert judge(nobody_waits, FRESH, 2).suspects == (0, 1)
    behind = beats({}, {"microbatch": 0}, {"step": 4, "microbatch": 7}, {})
    assert judge(behind, FRESH, 4).suspects == (1, 2)


def test_the_slow_are_named() -> None:
    def named(*busy: float) -> list[int]:
        return list(stragglers(beats(*({"busy_seconds": seconds} for seconds in busy))))

    assert named(1.0, 1.0, 1.0, 1.6) == [3]
    assert named(1.0, 1.0, 1.0, 1.4) == [], "not by half"
    assert named(0.01, 0.01, 0.01, 0.09) == [], "not by a tenth of a second"
    assert named(1.0, 2.0) == [1]
    assert named(5.0) == []

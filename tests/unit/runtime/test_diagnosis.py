"""Who is to blame for a hang, and who is slow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distllm.runtime.diagnosis import judge, stragglers
from distllm.runtime.heartbeat import Beat, decode, encode
from distllm.runtime.verdict import find_verdict, shown_ranks

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
    assert judge(stuck, FRESH | {3: 20.0}, 4, stale_seconds=30).suspects == (1,), "seldom beats"
    behind = beats({}, {"microbatch": 0}, {"step": 4, "microbatch": 7}, {})
    assert judge(behind, FRESH, 4).suspects == (1, 2)


def test_the_slow_are_named() -> None:
    def named(*busy: float) -> list[int]:
        return list(stragglers(dict(enumerate(busy))))

    assert named(1.0, 1.0, 1.0, 1.6) == [3]
    assert named(1.0, 1.0, 1.0, 1.4) == [], "not by half"
    assert named(0.01, 0.01, 0.01, 0.09) == [], "not by a tenth of a second"
    assert named(1.0, 2.0) == [1]
    assert named(5.0) == []


def test_whose_beats_go_on_lives_whatever_the_clocks_say() -> None:
    counts, earlier = {0: 9, 1: 5, 2: 1}, {0: 3, 1: 5}
    read = {rank: decode(encode(beat, counts[rank])) for rank, beat in beats({}, {}, {}).items()}
    records = {rank: record for rank, record in read.items() if record}
    verdict = find_verdict(records, earlier, world_size=4, seconds=5.0)
    assert verdict.diagnosis.suspects == (1, 3), "1 has stopped, 3 was never seen"
    assert verdict.ages == {0: 0.0, 1: 5.0, 2: 0.0}
    written = json.loads(verdict.to_json(hang_seconds=4))
    assert list(written["ranks"]) == ["0", "1", "2"]
    assert written["ranks"]["1"]["seconds_since_last_sign"] == 5.0
    assert written["suspects"] == [1, 3]


def test_the_file_of_a_verdict_stays_small() -> None:
    assert shown_ranks([2], range(4)) == [0, 1, 2, 3]
    shown = shown_ranks(range(5000, 9000), range(16384))
    assert len(shown) == 256
    assert shown[-64:] == list(range(5000, 5064))
    assert shown[:192] == list(range(192))


def test_a_verdict_on_many_ranks_takes_seconds() -> None:
    """Not the square of their number: minutes."""
    alike = {rank: replace(WAITING, rank=rank) for rank in range(16384)}
    alike[9] = replace(alike[9], microbatch=0)
    begin = time.process_time()
    assert judge(alike, dict.fromkeys(alike, 0.0), len(alike)).suspects == (9,)
    assert time.process_time() - begin < 1

"""Find the ranks that cause a hang, from what every rank was doing when progress stopped. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from distllm.runtime.heartbeat import Beat


@dataclass(frozen=True)
class Diagnosis:
    """The result of a diagnosis. suspects: ranks that the others wait for; empty where none stands out."""

    suspects: tuple[int, ...]
    reason: str


def judge(
    beats: Mapping[int, Beat], ages: Mapping[int, float], world_size: int, stale_seconds: float = 5.0
) -> Diagnosis:
    """Diagnose a hang. beats: the last of each rank. ages: seconds since then.

    In order: a rank that stopped writing beats is stopped, dead, or blocked inside one call; a rank that
    writes beats but waits for no other, while others wait, is stuck in its own work; of ranks that all wait,
    those that are behind did not reach the point where the others expected them.
    """
    silent = [rank for rank in range(world_size) if ages.get(rank, float("inf")) > stale_seconds]
    if silent:
        return Diagnosis(tuple(silent), "no sign of life: stopped, dead, or blocked inside one call")
    waiting = [rank for rank, beat in beats.items() if beat.collective]
    stuck = [rank for rank, beat in beats.items() if not beat.collective]
    if waiting and stuck:
        return Diagnosis(tuple(stuck), "alive and outside of communication, while the others wait")
    if not waiting:
        return Diagnosis(tuple(stuck), "alive, and no rank waits for another")
    progress = {rank: (beat.step, beat.microbatch) for rank, beat in beats.items()}
    furthest = max(progress.values())
    behind = [rank for rank in progress if progress[rank] < furthest]
    if behind:
        return Diagnosis(tuple(behind), "waiting like all others, but behind them")
    return Diagnosis((), "all ranks wait at the same place: the network, or ranks in different collectives")


def stragglers(
    busy: Mapping[int, float], factor: float = 1.5, least_seconds: float = 0.1
) -> dict[int, float]:
    """Return {rank: its busy time over the median}, of ranks that slow the others down.

    Busy time is the part of a step outside of communication: in communication fast ranks wait for slow ones.
    """
    if len(busy) < 2:
        return {}
    median = statistics.median_low(busy.values())
    return {
        rank: seconds / max(median, 1e-3)
        for rank, seconds in busy.items()
        if seconds > factor * median and seconds - median > least_seconds
    }

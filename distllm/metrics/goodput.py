"""Account for every second of a run's time, from its events and rows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from distllm.metrics.format import duration, plural, table

Event = Mapping[str, Any]
# The phases of a step, in order; rows have each as NAME_seconds (engine/phases.py measures them).
PHASES = ("data", "forward", "backward", "pipeline_wait", "optimizer")


@dataclass(frozen=True)
class Account:
    """Seconds of a run from the start of its first process to the last time it wrote.

    productive: in steps that count.
    start_up: of processes, until their first step.
    checkpoints: for which training stood still.
    validation: likewise.
    lost: in steps that were rejected, or repeated after a restart or a rewind.
    waiting: between the last output of one start and the process of the next.
    other: the rest: the part of a step that a kill interrupted, the completion and the plots at the end.
    """

    total: float
    productive: float
    start_up: float
    checkpoints: float
    validation: float
    lost: float
    waiting: float
    starts: int
    steps: int
    lost_steps: int

    @property
    def other(self) -> float:
        known = (self.productive, self.start_up, self.checkpoints, self.validation, self.lost, self.waiting)
        return max(0.0, self.total - sum(known))

    @property
    def goodput(self) -> float:
        """Return the productive fraction of the time."""
        return self.productive / self.total if self.total > 0 else 0.0


def account(events: Sequence[Event], rows: Sequence[Mapping[str, Any]], last_sign: float) -> Account:
    """Compute the account. events, rows: of the run directory.

    last_sign: seconds since the epoch when the run last wrote.
    """
    starts = _of(events, "start")
    begins = [event["process_started"] for event in starts]
    waiting = sum(
        max(0.0, event["process_started"] - event["previous_sign"])
        for event in starts
        if event["previous_sign"]
    )
    lost_to_restarts = sum(event["lost_seconds"] for event in starts)
    rewinds, refusals = _of(events, "rewind"), _of(events, "step refused")
    end = max([last_sign, *(_seconds(event["time"]) for event in events)], default=0.0)
    return Account(
        total=end - begins[0] if begins else 0.0,
        productive=sum(row["step_seconds"] for row in rows if "step_seconds" in row),
        start_up=sum(event["start_up_seconds"] for event in _of(events, "ready")),
        checkpoints=sum(
            event["blocking_seconds"]
            for event in events
            if event["kind"] in ("checkpoint", "checkpoint failed")
        ),
        validation=sum(row.get("validation_seconds", 0.0) for row in rows),
        lost=lost_to_restarts
        + sum(event.get("lost_seconds", 0.0) for event in rewinds)
        + sum(event["seconds"] for event in refusals),
        waiting=waiting,
        starts=len(starts),
        steps=sum("step_seconds" in row for row in rows),
        lost_steps=sum(event["lost_steps"] for event in starts)
        + sum(event.get("lost_steps", 0) for event in rewinds)
        + len(refusals),
    )


def describe(found: Account) -> str:
    """Format the account as a table."""
    parts = {
        "productive": (found.productive, plural(found.steps, "step")),
        "start-up": (found.start_up, plural(found.starts, "start")),
        "checkpoints": (found.checkpoints, "for which training stood still"),
        "validation": (found.validation, ""),
        "lost work": (found.lost, f"{plural(found.lost_steps, 'step')} rejected or repeated"),
        "waiting": (found.waiting, "between two starts"),
        "other": (found.other, ""),
    }
    total = found.total or 1.0
    lines = {
        name: f"{100 * seconds / total:5.1f}%  {duration(seconds):>6}  {note}".rstrip()
        for name, (seconds, note) in parts.items()
    }
    return f"{100 * found.goodput:.1f}% of {duration(found.total)} were productive\n{table(lines)}"


def step_account(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return mean seconds of each phase of a step, and of the `rest` outside all phases.

    Empty where rows have no phases. Measured on rank 0, without profiled steps, which are slower.
    """
    timed = [row for row in rows if "forward_seconds" in row and not row.get("profiled")]
    if not timed:
        return {}
    phases = {
        phase: sum(row.get(f"{phase}_seconds", 0.0) for row in timed) / len(timed)
        for phase in PHASES
        if any(f"{phase}_seconds" in row for row in timed)
    }
    rest = sum(row["step_seconds"] for row in timed) / len(timed) - sum(phases.values())
    return phases | {"rest": max(0.0, rest)}


def describe_step(seconds: Mapping[str, float]) -> str:
    """Format the phases of a step as a table; empty where there are none."""
    total = sum(seconds.values()) or 1.0
    return table({phase: f"{100 * value / total:5.1f}%  {value:8.4f} s" for phase, value in seconds.items()})


def _of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["kind"] == kind]


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()

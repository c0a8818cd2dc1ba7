"""Summarize a profile of a few steps on one page. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from distllm.metrics.format import bytes_

NUM_OPERATORS = 15
LONGEST_NAME = 64


@dataclass(frozen=True)
class Operator:
    """Calls and self time (without what it calls) of one operator or kernel in all profiled steps."""

    name: str
    calls: int
    host_seconds: float
    device_seconds: float


@dataclass(frozen=True)
class RankProfile:
    """The measurements of one rank.

    step_seconds: of each step.
    phases: seconds of each phase, over all steps.
    communication_seconds: in which at least one collective or message was in progress: kernels of NCCL,
        operations of gloo.
    device_seconds: in which the device was busy; None without a device.
    peak_memory_bytes: None likewise.
    """

    rank: int
    stage: int
    step_seconds: tuple[float, ...]
    phases: Mapping[str, float]
    communication_seconds: float
    device_seconds: float | None
    peak_memory_bytes: int | None
    operators: tuple[Operator, ...]

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)


def union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return the seconds covered by spans (begin, end) that may overlap."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def profile_summary(profiles: Sequence[RankProfile], steps: range) -> str:
    """Write the summary. profiles: of all traced ranks; the operators of the first are listed."""
    first = profiles[0]
    title = f"steps {steps.start} to {steps.stop - 1}, under the profiler (which slows them down)"
    parts = [title, _ranks(profiles)]
    for name, seconds_of in (("CPU", _host), ("device", _device)):
        if any(seconds_of(operator) > 0 for operator in first.operators):
            parts.append(_operators(first, name, seconds_of))
    return "\n\n".join(parts) + "\n"


def _ranks(profiles: Sequence[RankProfile]) -> str:
    """Format one line per rank; percentages are of the steps' wall-clock time."""
    phases = list(dict.fromkeys(phase for profile in profiles for phase in profile.phases))
    names = ["rank", "stage", "s/step", *phases, "other", "comm.", "idle", "peak memory"]
    lines = [names, *(_rank(profile, phases) for profile in profiles)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    table = [
        "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join(
        [
            *table,
            "comm.: while a collective or message was under way. idle: while the device did nothing",
        ]
    )


def _rank(profile: RankProfile, phases: Sequence[str]) -> list[str]:
    total = profile.seconds or 1.0
    share = {phase: profile.phases.get(phase, 0.0) / total for phase in phases}
    idle = "-" if profile.device_seconds is None else f"{1 - profile.device_seconds / total:.1%}"
    peak = "-" if profile.peak_memory_bytes is None else bytes_(profile.peak_memory_bytes)
    return [
        str(profile.rank),
        str(profile.stage),
        f"{profile.seconds / max(len(profile.step_seconds), 1):.3f}",
        *(f"{value:.1%}" for value in share.values()),
        f"{max(0.0, 1 - sum(share.values())):.1%}",
        f"{profile.communication_seconds / total:.1%}",
        idle,
        peak,
    ]


def _host(operator: Operator) -> float:
    return operator.host_seconds


def _device(operator: Operator) -> float:
    return operator.device_seconds


def _operators(profile: RankProfile, name: str, seconds_of: Callable[[Operator], float]) -> str:
    """List the operators of one rank with the most self time."""
    num_steps = max(len(profile.step_seconds), 1)
    top = sorted(profile.operators, key=seconds_of, reverse=True)[:NUM_OPERATORS]
    total = sum(map(seconds_of, profile.operators))
    lines = [
        f"rank {profile.rank}, {name}: self time of operators",
        "  ms/step   share  calls/step  operator",
    ]
    for operator in top:
        seconds = seconds_of(operator)
        label = operator.name if len(operator.name) <= LONGEST_NAME else operator.name[:LONGEST_NAME] + "..."
        lines.append(
            f"{1000 * seconds / num_steps:9.2f}  {seconds / total:6.1%}"
            f"  {operator.calls / num_steps:10.1f}  {label}"
        )
    return "\n".join(lines)

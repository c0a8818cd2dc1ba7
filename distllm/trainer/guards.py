"""What to do about a step that must not happen. Pure: the same numbers give every rank the same decision."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from distllm.config.schema import Fault
from distllm.engine.engine import Limits, StepResult
from distllm.trainer.state import TrainState

# Of a normal distribution, the standard deviation is this many median absolute deviations.
DEVIATIONS_TO_SIGMA = 1.4826
# A loss that hardly moves must not make every ripple a spike: sigma is at least this part of the median.
LEAST_RELATIVE_SIGMA = 0.01


class Action(Enum):
    """commit: the step has happened. retry: the same samples again. skip: the next samples. rewind: back to
    the last checkpoint, and from there without these samples. give_up: the job cannot go on."""

    COMMIT = "commit"
    RETRY = "retry"
    SKIP = "skip"
    REWIND = "rewind"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str = ""


def robust_bound(values: Sequence[float], threshold: float) -> float:
    """median + threshold * sigma, sigma from the median absolute deviation: outliers do not move it."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    sigma = max(DEVIATIONS_TO_SIGMA * deviation, LEAST_RELATIVE_SIGMA * abs(median))
    return median + threshold * sigma


def limits(state: TrainState, settings: Fault) -> Limits:
    """What the next step may reach; only finite numbers are asked for until the window is full."""
    if settings.spike_action == "off" or len(state.losses) < settings.spike_window:
        return Limits()
    return Limits(
        robust_bound(state.losses, settings.spike_threshold),
        robust_bound(state.grad_norms, settings.spike_threshold),
    )


def decide(
    result: StepResult,
    allowed: Limits,
    settings: Fault,
    *,
    refused_in_a_row: int,
    tries: int,
    num_rewinds: int,
) -> Decision:
    """refused_in_a_row: before this step, of any samples. tries: of these samples before this one.

    num_rewinds: since the job was started.
    """
    if result.is_applied:
        return Decision(Action.COMMIT)
    reason = _reason(result, allowed)
    if refused_in_a_row + 1 >= settings.max_refused_steps:
        return Decision(
            Action.GIVE_UP, f"{refused_in_a_row + 1} steps in a row were refused; the last: {reason}"
        )
    if not is_finite(result):
        # Once more: memory that flipped a bit does not do it twice, samples that overflow do.
        return Decision(Action.RETRY if tries == 0 else Action.SKIP, reason)
    if settings.spike_action == "skip":
        return Decision(Action.SKIP, reason)
    if num_rewinds >= settings.max_rewinds:
        return Decision(Action.GIVE_UP, f"there were {num_rewinds} rewinds already, and again: {reason}")
    return Decision(Action.REWIND, reason)


def is_finite(result: StepResult) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


def _reason(result: StepResult, allowed: Limits) -> str:
    if not is_finite(result):
        return f"not finite: loss {result.loss}, gradient norm {result.grad_norm}"
    spikes = [
        f"{name} {value:.4g} is above {bound:.4g}"
        for name, value, bound in (
            ("loss", result.loss, allowed.loss),
            ("gradient norm", result.grad_norm, allowed.grad_norm),
        )
        if value > bound
    ]
    return "spike: " + ", ".join(spikes)

"""What to do about a step that was refused. Pure: the same numbers give every rank the same decision."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from distllm.config.schema import Fault
from distllm.engine.engine import Limits, StepResult
from distllm.trainer.state import TrainState

# The standard deviation of a normal distribution is this many median absolute deviations.
DEVIATIONS_TO_SIGMA = 1.4826
# If the loss hardly changes, small fluctuations must not count as spikes: sigma is at least this part of the
# median.
LEAST_RELATIVE_SIGMA = 0.01


class Action(Enum):
    """What to do after a step.

    commit: go on, since the step has happened.
    retry: train on the same samples again.
    skip: go on with the next samples.
    rewind: go back to the last checkpoint, and from there on leave out these samples.
    give_up: end the job, since it cannot go on.
    """

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
    """Return median + threshold * sigma.

    sigma is estimated from the median absolute deviation, which outliers hardly change.
    """
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values)
    sigma = max(DEVIATIONS_TO_SIGMA * deviation, LEAST_RELATIVE_SIGMA * abs(median))
    return median + threshold * sigma


def limits(state: TrainState, settings: Fault) -> Limits:
    """Return the limits of the next step.

    Until the window is full, or if `spike_action` is off, loss and gradient norm only have to be finite.
    """
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
    """Decide what to do after a step with this result.

    allowed: the limits of the step.
    refused_in_a_row: number of steps refused directly before this one, with whatever samples.
    tries: number of earlier tries of the same samples.
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
        # Try once more: a bit flip in memory does not happen twice, but samples that overflow do so again.
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

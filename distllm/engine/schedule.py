"""The learning rate, a pure function of the step."""

from __future__ import annotations

import math

from distllm.config.schema import Schedule


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: Schedule) -> float:
    """Return the learning rate of update `step` (0 is the first) of `total_steps`.

    Warm-up is linear, peak * (step + 1) / warmup_steps, so that the first update is not wasted on a rate of
    0. After it, `cosine` is half a cosine down to min_lr (Loshchilov & Hutter 2017, arXiv:1608.03983), `wsd`
    stays at the peak and falls linearly to min_lr at the end (Hu et al. 2024, arXiv:2404.06395), and
    `constant` stays at the peak.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        decay_steps = schedule.decay_steps or max(1, total_steps - schedule.warmup_steps)
        progress = min(1.0, (step - schedule.warmup_steps + 1) / decay_steps)
        return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.kind == "wsd":
        decay_steps = schedule.decay_steps or max(1, total_steps // 10)
        progress = max(0.0, (step + 1 - (total_steps - decay_steps)) / decay_steps)
        return peak + (schedule.min_lr - peak) * min(1.0, progress)
    return peak

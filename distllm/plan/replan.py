"""The nearest legal layout for a job that has another number of ranks than its layout needs."""

from __future__ import annotations

import os
from dataclasses import replace

from distllm.config import rules
from distllm.config.compose import Request
from distllm.config.problems import UserError
from distllm.config.registry import imported
from distllm.config.schema import Config
from distllm.plan.nearest import nearest_layouts


def replanned(error: UserError, request: Request) -> Config:
    """Return the rejected job in the nearest layout that its ranks allow, with the same global batch.

    Raises `error` where `fault.replan` is off, where something other than the layout is wrong, or where no
    layout would be legal without another global batch.
    """
    config, world_size, verb = error.config, request.world_size, request.verb
    if config is None or not _is_enabled(config) or rules.check_versions():
        raise error
    for proposal in nearest_layouts(config, world_size, most=10):
        if "train.global_batch_size" in proposal.changes:
            continue
        if rules.check(proposal.config, world_size, verb.rules):
            continue
        if rules.check_environment(proposal.config, verb.environment_rules):
            continue
        if any(
            problem for rule in verb.late_rules for problem in imported(rule)(proposal.config, world_size)
        ):
            continue
        reasons = "; ".join(f"{p.setting}={p.value} {p.rule}" for p in error.problems)
        told = f"{world_size} ranks: {', '.join(proposal.overrides)}, since {reasons}"
        return replace(proposal.config, fault=replace(config.fault, replanned=told))
    raise error


def _is_enabled(config: Config) -> bool:
    if config.fault.replan is None:
        return os.environ.get("DISTLLM_ELASTIC") == "1"
    return config.fault.replan

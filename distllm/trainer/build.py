"""Model and engine of a job, put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from distllm.config.schema import Config
from distllm.engine.create import create_engine, holder
from distllm.engine.engine import Engine
from distllm.engine.objective import Objective
from distllm.layout.groups import Groups
from distllm.model.build import build_model


def build_engine(
    config: Config,
    vocab_size: int,
    groups: Groups,
    device: torch.device,
    objective: Objective,
    warn: Callable[[str], None] = warnings.warn,
    *,
    draws: bool = True,
) -> Engine:
    """Build this rank's part of the model and the engine that trains it. Collective; see `build_model`."""
    hold = holder(config, groups)
    built = build_model(config, vocab_size, groups, device, warn, hold=hold, draws=draws)
    return create_engine(built.chunks, built.places, config, groups, objective)

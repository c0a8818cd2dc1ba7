"""The choice between the two engines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.objective import Objective
from distllm.layout.groups import Groups
from distllm.layout.place import Place


def create_engine(
    chunks: Sequence[nn.Module],
    places: dict[nn.Parameter, Place],
    config: Config,
    groups: Groups,
    objective: Objective,
) -> Engine:
    """Create the engine of the configured ZeRO stage: our own for stage 0, DeepSpeed for stages 1 to 3.

    Stage 0 does not import DeepSpeed, which takes a second.
    """
    if config.zero.stage == 0:
        from distllm.engine.replicated import ReplicatedEngine

        return ReplicatedEngine(chunks, places, config, groups, objective)
    from distllm.engine.zero import ZeroEngine

    return ZeroEngine(chunks, places, config, groups, objective)

"""The choice between the two engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.objective import Objective
from distllm.layout.groups import Groups
from distllm.layout.place import Place


def holder(config: Config, groups: Groups) -> Callable[[nn.Parameter], None]:
    """Return what the engine does with each parameter once it has its values, before the next is made."""
    if config.zero.stage < 3:
        return lambda parameter: None
    from distllm.engine.zero import partitioner

    return partitioner(config, groups)


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

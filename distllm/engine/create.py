"""The choice between the two engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.objective import Objective
from distllm.layout.flat import is_flat
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
    """Create the engine of the configured ZeRO stage.

    Our own for stages 0 and 1; DeepSpeed for stages 2 and 3, and for stage 1 with offloaded optimizer states.

    Ours does not import DeepSpeed, which takes a second.
    """
    if is_flat(config.zero):
        from distllm.engine.flat import FlatEngine

        return FlatEngine(chunks, places, config, groups, objective)
    from distllm.engine.zero import ZeroEngine

    return ZeroEngine(chunks, places, config, groups, objective)

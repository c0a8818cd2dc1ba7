"""The optimizer of a recipe, over the parameters of this rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from distllm.config.schema import Optimizer
from distllm.layout.place import Place
from distllm.optimizers import recipe_of


def create_optimizer(
    masters: Iterable[tuple[Place, nn.Parameter]], settings: Optimizer
) -> torch.optim.Optimizer:
    """Create the optimizer of `settings`, with the parameter groups of its recipe.

    masters: what it updates, with the place of the parameter: fp32 copies of all or parts, or the parameters.
    """
    recipe = recipe_of(settings)
    groups: list[list[nn.Parameter]] = [[] for _ in range(recipe.num_groups)]
    for place, master in masters:
        groups[recipe.group_of(place.is_decayed)].append(master)
    return recipe.build(groups, settings)

"""The optimizer of a recipe, over the parameters of this rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distllm.config.schema import Optimizer
from distllm.layout.place import Place
from distllm.optimizers import recipe_of


def create_optimizer(
    places: Mapping[nn.Parameter, Place],
    masters: Mapping[nn.Parameter, nn.Parameter],
    settings: Optimizer,
) -> torch.optim.Optimizer:
    """Create the optimizer of `settings`, with the parameter groups of its recipe.

    masters: what it updates for each parameter: an fp32 copy, or the parameter itself.
    """
    recipe = recipe_of(settings)
    groups: list[list[nn.Parameter]] = [[] for _ in range(recipe.num_groups)]
    for parameter, place in places.items():
        groups[recipe.group_of(place.is_decayed)].append(masters[parameter])
    return recipe.build(groups, settings)

"""What the rest of the package asks of an optimizer. torch is imported only where one is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from distllm.config.problems import Problem
from distllm.config.registry import OPTIMIZERS
from distllm.config.schema import Config, Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn


class Recipe(ABC):
    """One optimizer.

    states: names, in its own words, of what it keeps for every element of a parameter, in fp32, beside the
    fp32 weight. num_groups: groups of parameters with settings of their own; they exist on every rank in the
    same order, even where one is empty, since ZeRO's collectives count them. needs_whole_matrices: an update
    looks at a matrix as a whole, so ZeRO must not cut it.
    """

    states: tuple[str, ...]
    num_groups: int = 2
    needs_whole_matrices: bool = False

    @property
    def tensors_per_parameter(self) -> int:
        """What a checkpoint holds of a parameter: the fp32 weight, and the states."""
        return 1 + len(self.states)

    def group_of(self, is_decayed: bool) -> int:
        """The group of a parameter: those that decay come first."""
        return 0 if is_decayed else 1

    def problems(self, config: Config) -> Iterator[Problem]:
        """What the optimizer cannot be combined with."""
        if self.needs_whole_matrices and config.zero.stage > 0:
            rule = f"must be 0 for optimizer.kind={config.optimizer.kind}, which updates whole matrices"
            yield Problem("zero.stage", config.zero.stage, rule, "zero.stage=0")

    @abstractmethod
    def build(self, groups: Sequence[Sequence[nn.Parameter]], settings: Optimizer) -> torch.optim.Optimizer:
        """The optimizer over `groups`, [num_groups] lists of fp32 tensors to update. The learning rate is
        written into its `param_groups` before every update."""


def recipe_of(settings: Optimizer) -> Recipe:
    recipe: Recipe = OPTIMIZERS[settings.kind]
    return recipe

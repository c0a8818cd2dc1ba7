"""The plan's view of the ranks of one pipeline stage, before any process exists. Pure.

Memory, traffic and metadata of a rank are functions of its view.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from distllm.config.axes import REST, fixed_degrees
from distllm.config.schema import Config
from distllm.config.stages import Stage, pipeline_stages
from distllm.layout.grid import Grid
from distllm.model.families import Family, family_of
from distllm.model.parameters import Table, stage_parameters
from distllm.optimizers import Recipe, recipe_of
from distllm.plan.held import Held, held_parameters


@dataclass(frozen=True)
class RankView:
    """Any rank of a pipeline stage under a legal layout; all of them hold and send equal amounts."""

    config: Config
    vocab_size: int
    grid: Grid
    stage_index: int

    @classmethod
    def of(cls, config: Config, vocab_size: int, dp_size: int, stage_index: int) -> RankView:
        """View the layout of `config` on `dp_size` data-parallel ranks."""
        grid = Grid(**fixed_degrees(config.parallel) | {REST: dp_size})
        return cls(config, vocab_size, grid, stage_index)

    @property
    def family(self) -> Family:
        return family_of(self.config.model)

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.config.optimizer)

    @property
    def dp_size(self) -> int:
        return self.grid.data

    @property
    def padded_vocab_size(self) -> int:
        return self.config.model.padded_vocab_size(self.vocab_size)

    @cached_property
    def stage(self) -> Stage:
        return pipeline_stages(self.config.model.num_layers, self.config.parallel)[self.stage_index]

    @cached_property
    def table(self) -> Table:
        """Return the whole parameters of which the rank holds parts."""
        return stage_parameters(self.config.model, self.stage, self.padded_vocab_size)

    @cached_property
    def held(self) -> Held:
        """Return the rank's parts, before ZeRO partitions anything."""
        return held_parameters(self.table, self.grid.degrees, self.recipe)

    @cached_property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Return {module: names of its parameters}."""
        found: dict[str, tuple[str, ...]] = {}
        for name, entry in self.table.items():
            found[entry.module] = (*found.get(entry.module, ()), name)
        return found

    @property
    def num_microbatches(self) -> int:
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.dp_size)

    @property
    def tokens_per_microbatch(self) -> int:
        return self.config.train.micro_batch_size * self.config.model.seq_length


def rank_views(config: Config, vocab_size: int, grid: Grid) -> list[RankView]:
    """Return one view for each pipeline stage."""
    return [RankView(config, vocab_size, grid, stage) for stage in range(grid.pipeline)]

"""Whether a job fits the devices of its cluster, and what it must at least need. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from distllm.config.layout_rules import LAYOUT_RULES
from distllm.config.problems import Problem
from distllm.config.schema import Config, Model
from distllm.layout.grid import Grid
from distllm.model.families import family_of
from distllm.model.parameters import count_parameters
from distllm.optimizers import recipe_of
from distllm.plan.gradients import BYTES
from distllm.plan.memory import estimate_memory, rank_memory
from distllm.plan.nearest import Changes, is_legal, nearest_layouts
from distllm.plan.rank_view import RankView

GIB = 2**30
MOST_NAMED = 3  # kinds of memory in a refusal
MOST_DOUBLINGS = 6  # of the number of ranks, until a job fits


@dataclass(frozen=True)
class DeviceLimit:
    """The bytes that no rank may exceed, for a vocabulary of `vocab_size` tokens."""

    memory_bytes: int
    vocab_size: int

    def holds(self, config: Config, world_size: int) -> bool:
        """Return whether every rank of a legal layout fits; the stages that can be fullest are looked at."""
        grid = Grid.of(config.parallel, world_size)
        views = (RankView(config, self.vocab_size, grid, stage) for stage in _fullest_stages(grid.pipeline))
        return all(rank_memory(view).total <= self.memory_bytes for view in views)

    def may_hold(self, config: Config, changes: Changes, world_size: int) -> bool:
        return _Least(config, changes, world_size, self.vocab_size).bytes <= self.memory_bytes


def limit_of(config: Config, vocab_size: int) -> DeviceLimit | None:
    """Return what the job must fit; None where `cluster` names no device."""
    size = config.cluster.memory_bytes
    return None if size is None else DeviceLimit(size, vocab_size)


def misfit(config: Config, vocab_size: int, world_size: int, more_ranks: str) -> Problem | None:
    """Return the problem of a legal job that does not fit, with the nearest layout that does; else None.

    more_ranks: how a number of ranks is written in the fix, behind overrides, where these are too few.
    """
    limit = limit_of(config, vocab_size)
    if limit is None or limit.holds(config, world_size):
        return None
    kinds = estimate_memory(config, vocab_size, Grid.of(config.parallel, world_size))
    most = sorted(kinds, key=lambda kind: kinds[kind], reverse=True)[:MOST_NAMED]
    rule = (
        f"must be at least the {sum(kinds.values()) / GIB:.1f} GiB that the fullest rank needs "
        f"({', '.join(f'{kind} {kinds[kind] / GIB:.1f}' for kind in most)}, ...)"
    )
    fix = _fix(config, world_size, limit, more_ranks)
    return Problem("cluster.memory_gib", config.cluster.memory_gib, rule, fix)


def _fix(config: Config, world_size: int, limit: DeviceLimit, more_ranks: str) -> str:
    if found := nearest_layouts(config, world_size, most=1, limit=limit):
        return " ".join(found[0].overrides)
    for doublings in range(1, MOST_DOUBLINGS + 1):
        more = world_size << doublings
        ranks = more_ranks.format(more)
        if is_legal(config, more, LAYOUT_RULES) and limit.holds(config, more):
            return ranks
        if found := nearest_layouts(config, more, most=1, limit=limit):
            return " ".join([*found[0].overrides, ranks])
    return "a smaller model.seq_length, or a device with more memory"


def _fullest_stages(pipeline: int) -> list[int]:
    """Return the stages of which one is fullest: most in flight, most layers, or the loss."""
    return sorted({0, min(1, pipeline - 1), pipeline - 1})


class _Least:
    """A lower bound of what the fullest rank needs, in microseconds: averages over stages and ranks."""

    def __init__(self, config: Config, changes: Changes, world_size: int, vocab_size: int) -> None:
        self.config, self.changes, self.vocab_size = config, changes, vocab_size
        self.tensor, self.pipeline = self.value("parallel.tensor"), self.value("parallel.pipeline")
        self.dp_size = max(1, world_size // (self.tensor * self.pipeline))

    def value(self, setting: str) -> Any:
        section, name = setting.split(".")
        return self.changes.get(setting, getattr(getattr(self.config, section), name))

    @property
    def bytes(self) -> float:
        return self.states + self.activations

    @cached_property
    def states(self) -> float:
        """Return bytes of weights, gradients and AdamW-like states, without padding."""
        train, zero = self.config.train, self.value("zero.stage")
        numel = _num_parameters(self.config.model, self.vocab_size) / (self.tensor * self.pipeline)
        weights, gradients = BYTES[train.precision], BYTES[train.gradient_accumulation]
        states = 0 if self.config.zero.offload_optimizer else 4 * _states_per_parameter(self.config, zero)
        gradients = 0 if self.config.zero.offload_optimizer else gradients
        whole = {0: weights + gradients + states, 1: weights + gradients, 2: weights, 3: 0}[zero]
        return numel * (whole + (weights + gradients + states - whole) / self.dp_size)

    @cached_property
    def activations(self) -> float:
        """Return bytes of activations on the first stage, which may have one layer less than the average."""
        config, model = self.config, self.config.model
        micro = self.value("train.micro_batch_size")
        microbatches = self.value("train.global_batch_size") // (micro * self.dp_size)
        in_flight = min(self.pipeline, max(1, microbatches))
        is_placed = self.value("parallel.first_stage_layers") or self.value("parallel.last_stage_layers")
        layers = 0 if is_placed else model.num_layers // self.pipeline - (self.pipeline > 1)
        is_cut = self.value("parallel.sequence")
        per_layer = _layer_activations(model, self.tensor, is_cut)
        if self.value("recompute.granularity") == "full" and self.value("recompute.num_layers") is None:
            per_layer = model.hidden_size // (self.tensor if is_cut else 1)
        elif self.value("recompute.granularity") == "full":
            per_layer = 0
        tokens = micro * model.seq_length
        return float(tokens * BYTES[config.train.precision] * max(0, layers) * in_flight * per_layer)


def _states_per_parameter(config: Config, zero_stage: int) -> int:
    tensors = recipe_of(config.optimizer).tensors_per_parameter
    is_kept_once = zero_stage < 2 and config.train.precision == "fp32"  # no copy of the weights
    return tensors - is_kept_once


@lru_cache(maxsize=32)
def _num_parameters(model: Model, vocab_size: int) -> int:
    return count_parameters(model, vocab_size).total


@lru_cache(maxsize=256)
def _layer_activations(model: Model, tensor: int, sequence: bool) -> int:
    return family_of(model).activations(model, tensor, sequence)

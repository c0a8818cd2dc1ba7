"""The legal layouts nearest to an illegal one, or to one that does not fit the device. Pure.

Each change has a price, and candidates are tried from the cheapest on, so the first legal ones that fit are
the nearest. They are judged by the rules of `train`, and by plan/fit.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from distllm.config.layout_rules import (
    LAYOUT_RULES,
    Rule,
    sequence_is_cut,
    tensor_cuts_the_model,
    zero_has_what_is_asked,
)
from distllm.config.schema import Config
from distllm.config.stage_rules import (
    chunks_fill_the_stages,
    layers_fill_the_stages,
    uneven_settings_have_stages,
)

Changes = dict[str, Any]


class Limit(Protocol):
    """What a layout must fit."""

    def holds(self, config: Config, world_size: int) -> bool:
        """Return whether a legal layout fits."""

    def may_hold(self, config: Config, changes: Changes, world_size: int) -> bool:
        """Return False only where `config` with `changes` cannot fit; quickly, also for illegal layouts."""


# The price of each changed setting, added to the doublings or halvings of its value.
PRICE = 0.5
# Changes to the training itself cost more than changes to how it runs.
PRICE_OF_ANOTHER_BATCH = 8.0
# About as much as another forward pass, a third of a step, is worth: less than a doubling of a degree.
PRICE_OF_RECOMPUTING = 0.5
MOST_CANDIDATES = 10_000
MOST_MEASURED = 400  # each of which takes milliseconds
UNPLACED: Changes = {"parallel.first_stage_layers": None, "parallel.last_stage_layers": None}
EVEN: Changes = UNPLACED | {"parallel.embedding_as_layer": False, "parallel.loss_as_layer": False}
# Models such as Llama 3 405B have two layers less than even stages would hold.
COUNTED: Changes = UNPLACED | {"parallel.embedding_as_layer": True, "parallel.loss_as_layer": True}


@dataclass(frozen=True)
class Proposal:
    """A legal layout.

    changes: setting -> value.
    distance: doublings or halvings of all degrees, and PRICE per change.
    config: the job with the changes.
    """

    changes: Changes
    distance: float
    config: Config

    @property
    def overrides(self) -> list[str]:
        """Return the changes as overrides for the command line."""
        written = {None: "null", True: "true", False: "false"}
        return [
            f"{setting}={written[value] if value is None or isinstance(value, bool) else value}"
            for setting, value in self.changes.items()
        ]


def nearest_layouts(
    config: Config, world_size: int, most: int = 3, limit: Limit | None = None
) -> list[Proposal]:
    """Return at most `most` legal layouts, nearest first, none a superset of a nearer one's changes.

    Empty where the layout of `config` is legal and fits. It varies tensor, sequence and pipeline parallelism,
    chunks, the division of layers among stages, the micro-batch size and the ZeRO stage; at a high price, the
    global batch size.

    limit: what they must fit; then smaller micro-batches, every ZeRO stage and recomputation are tried too.
    """
    if is_legal(config, world_size, LAYOUT_RULES) and (limit is None or limit.holds(config, world_size)):
        return []
    proposals: list[Proposal] = []
    candidates = _candidates(config, world_size, limit)
    if limit:
        candidates = (c for c in candidates if limit.may_hold(config, c[1], world_size))
    for distance, changes in itertools.islice(candidates, MOST_MEASURED if limit else MOST_CANDIDATES):
        if any(proposal.changes.items() <= changes.items() for proposal in proposals):
            continue
        candidate = changed(config, changes)
        if is_legal(candidate, world_size, LAYOUT_RULES) and (
            limit is None or limit.holds(candidate, world_size)
        ):
            proposals.append(Proposal(changes, distance, candidate))
            if len(proposals) == most:
                break
    return proposals


def is_legal(config: Config, world_size: int, rules: Iterable[Rule]) -> bool:
    return not any(next(rule(config, world_size), None) for rule in rules)


def changed(config: Config, changes: Changes) -> Config:
    """Return `config` with some settings replaced."""
    for setting, value in changes.items():
        section, name = setting.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _candidates(config: Config, world_size: int, limit: Limit | None) -> Iterator[tuple[float, Changes]]:
    """Yield (distance, changes) in order of distance: combinations of parts that are each legal."""
    degrees = _divisors(world_size)
    tensors = _legal(
        config,
        ({"parallel.tensor": t, "parallel.sequence": s} for t in degrees for s in (False, True)),
        (tensor_cuts_the_model, sequence_is_cut),
    )
    pipelines = _legal(
        config,
        (
            {"parallel.pipeline": p, "parallel.virtual_pipeline": v, **even}
            for p in degrees
            for v in sorted({config.parallel.virtual_pipeline, *_divisors(config.model.num_layers)})
            if p * v <= config.model.num_layers + 2  # embedding and loss may count as layers
            for even in ({}, EVEN, COUNTED)
        ),
        (uneven_settings_have_stages, layers_fill_the_stages, chunks_fill_the_stages),
    )
    zeros = _legal(config, ({"zero.stage": zero_stage} for zero_stage in range(4)), (zero_has_what_is_asked,))
    if {} in zeros and limit is None:
        zeros = [{}]  # no other rule demands another ZeRO stage
    recomputes: list[Changes] = [{}, {"recompute.num_layers": None}] if config.recompute.num_layers else [{}]
    if limit and config.recompute.granularity != "full":
        recomputes.append({"recompute.granularity": "full"})
    found: list[tuple[float, Changes]] = []
    for tensor, pipeline in itertools.product(tensors, pipelines):
        degree = _value(config, tensor, "parallel.tensor") * _value(config, pipeline, "parallel.pipeline")
        if world_size % degree == 0:
            batches = _batches(config, pipeline, world_size // degree, with_smaller=limit is not None)
            for rest in itertools.product(batches, zeros, recomputes):
                changes = {name: value for part in (tensor, pipeline, *rest) for name, value in part.items()}
                found.append((_distance(config, changes), changes))
    return iter(sorted(found, key=lambda candidate: candidate[0]))


def _legal(config: Config, parts: Iterable[Changes], rules: tuple[Rule, ...]) -> list[Changes]:
    """Return the distinct changes that these parts make, for those that keep `rules`."""
    differences = [{k: v for k, v in part.items() if v != _value(config, {}, k)} for part in parts]
    distinct = [part for i, part in enumerate(differences) if part not in differences[:i]]
    return [part for part in distinct if is_legal(changed(config, part), 1, rules)]


def _batches(config: Config, pipeline: Changes, ranks: int, with_smaller: bool) -> list[Changes]:
    """Return ways to divide a batch: other micro-batch sizes, or the next global batch sizes.

    with_smaller: also micro-batches smaller than one that divides it.
    """
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    chunks = _value(config, pipeline, "parallel.virtual_pipeline")
    fewest = _value(config, pipeline, "parallel.pipeline") if chunks > 1 else 1  # microbatches
    if size % ranks == 0:
        fitting = [n for n in _divisors(size // ranks) if size // ranks // n >= fewest]
        if micro in fitting:
            smaller = [n for n in fitting if n < micro] if with_smaller else []
            return [{}, *({"train.micro_batch_size": n} for n in smaller)]
        if fitting:
            nearest = sorted(fitting, key=lambda n: abs(math.log2(n / micro)))
            return [{"train.micro_batch_size": n} for n in nearest[:2]]
    unit = micro * ranks
    sizes = {max(size // unit, fewest) * unit, max(-(-size // unit), fewest) * unit}
    return [{"train.global_batch_size": n} for n in sizes if n != size]


def _value(config: Config, changes: Changes, setting: str) -> Any:
    section, name = setting.split(".")
    return changes[setting] if setting in changes else getattr(getattr(config, section), name)


def _distance(config: Config, changes: Changes) -> float:
    return sum(_price(setting, _value(config, {}, setting), value) for setting, value in changes.items())


def _price(setting: str, before: Any, after: Any) -> float:
    if setting == "zero.stage":
        return PRICE + abs(after - before)
    if isinstance(before, bool) or before is None or after is None:
        return PRICE
    if isinstance(before, str):  # recompute.granularity
        return PRICE + PRICE_OF_RECOMPUTING
    doublings = abs(math.log2(after / before))
    return doublings + (PRICE_OF_ANOTHER_BATCH if setting == "train.global_batch_size" else PRICE)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

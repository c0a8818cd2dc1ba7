"""The engine of a job without its data: measurements use random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.microbatch import Microbatch
from distllm.layout.grid import Grid
from distllm.layout.groups import Role, create_groups, destroy_groups
from distllm.objectives import create_objective
from distllm.runtime import dist
from distllm.runtime.dist import Runtime
from distllm.trainer.build import build_engine

LEARNING_RATE = 1e-4  # of the measured steps: small enough for any model


@dataclass(frozen=True)
class World:
    """A started world.

    build: makes model and engine of this rank as `train` does, of a config that has the same layout.
    microbatches: this rank's of one global batch, of random tokens.
    """

    runtime: Runtime
    build: Callable[[Config], Engine]
    microbatches: list[Microbatch]


@contextmanager
def world(config: Config, vocab_size: int) -> Iterator[World]:
    """Start the ranks of the job for the duration of a block. Collective."""
    runtime = dist.start(timedelta(seconds=2 * config.fault.hang_seconds), config.parallel.tensor)
    succeeded = False
    try:
        grid = Grid.of(config.parallel, runtime.world_size)
        groups = create_groups(grid, runtime.timeout, config.parallel.virtual_pipeline)

        def build(config: Config) -> Engine:
            return build_engine(config, vocab_size, groups, runtime.device, create_objective(config))

        yield World(runtime, build, random_microbatches(config, vocab_size, groups.samples, runtime.device))
        succeeded = True
    finally:
        destroy_groups()
        dist.stop(runtime, succeeded)


def random_microbatches(
    config: Config, vocab_size: int, samples: Role, device: torch.device
) -> list[Microbatch]:
    """Return one data-parallel rank's part of a global batch: equal on the ranks that share a model."""
    sequences = config.train.global_batch_size // samples.size
    generator = torch.Generator().manual_seed(config.train.seed * samples.size + samples.rank)
    tokens = torch.randint(0, vocab_size, (sequences, config.model.seq_length + 1), generator=generator)
    return [Microbatch(part.to(device)) for part in tokens.split(config.train.micro_batch_size)]

"""Small jobs for tests: configurations composed as users compose them, and engines built from them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch

from distllm.config import compose
from distllm.config.schema import Config
from distllm.engine.engine import Engine, StepResult, create_engine
from distllm.engine.pipeline import Microbatch
from distllm.layout.grid import Grid
from distllm.layout.groups import Groups, create_groups, destroy_groups
from distllm.model.build import build_model

VOCAB_SIZE = 300

# Small, and such that rounding stays rounding. Adam divides a gradient by its own size: where a gradient is
# only rounding noise, the update is noise of the size of the learning rate. An epsilon far above the noise of
# fp32 gradients (1e-9 here) and below their size (1e-3) keeps such elements from moving.
SMALL_JOB = (
    "model=tiny",
    "tokenizer=bytes",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
    "optimizer.lr=0.003",
    "optimizer.epsilon=1e-6",
    "optimizer.clip_grad=0.3",  # below the norms that occur: clipping is active
    "zero.bucket_size=20_000",  # several buckets
    "zero.persistence_threshold=0",
)


@dataclass(frozen=True)
class Trace:
    """What a run leaves for comparison: per step loss and gradient norm; weights by canonical name."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]


def make_config(*overrides: str) -> Config:
    """The small job with overrides, composed as on the command line."""
    return compose.load(compose.parse("train", [*SMALL_JOB, *overrides]))


def global_batch(step: int, config: Config) -> torch.Tensor:
    """[global_batch, seq + 1] tokens of a small, learnable alphabet, the same under every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    return torch.randint(0, 16, shape, generator=generator)


def microbatches(step: int, config: Config, groups: Groups) -> list[Microbatch]:
    """This rank's part of the global batch of `step`."""
    size, dp_size = config.train.micro_batch_size, groups.grid.data
    batch = global_batch(step, config).split(size)
    return [Microbatch(tokens) for tokens in batch[groups.coordinates.data :: dp_size]]


def build_engine(config: Config, vocab_size: int = VOCAB_SIZE) -> Engine:
    """Model and engine of a config in a world that is started; `finish` undoes it."""
    grid = Grid.from_world_size(
        torch.distributed.get_world_size(), tensor=config.parallel.tensor, pipeline=config.parallel.pipeline
    )
    groups = create_groups(grid, timedelta(seconds=60))
    built = build_model(config, vocab_size, groups, torch.device("cpu"))
    return create_engine(built.module, built.places, config, groups)


def finish(engine: Engine) -> None:
    destroy_groups()


def train(engine: Engine, config: Config, steps: int, learning_rate: float | None = None) -> Trace:
    """`steps` updates at a constant learning rate."""
    results: list[StepResult] = []
    for step in range(steps):
        batch = microbatches(step, config, engine.groups)
        results.append(engine.train_step(batch, learning_rate or config.optimizer.lr))
    return Trace(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        gather_weights(engine),
    )


def gather_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 weights of the whole model by canonical name, put together from every rank's fragments."""
    mine = [
        (f.place.name, f.place.global_shape, f.place.boxes(f.start, f.stop), f.tensors["weight"].clone())
        for f in engine.fragments()
    ]
    everyone: list[list] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, mine)
    weights: dict[str, torch.Tensor] = {}
    for name, global_shape, boxes, flat in (item for part in everyone for item in part):
        whole = weights.setdefault(name, torch.full(global_shape, float("nan")))
        begin = 0
        for box in boxes:
            index = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            whole[index] = flat[begin : begin + box.numel].view(box.sizes)
            begin += box.numel
    assert not any(torch.isnan(w).any() for w in weights.values()), "the fragments do not cover the model"
    return weights


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None, "no backward pass has reached this parameter"
    return parameter.grad


def assert_weights_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float, what: str
) -> None:
    """Equal names, and every element within `atol`; the message names the worst parameter."""
    assert actual.keys() == expected.keys(), what
    errors = {name: (actual[name].double() - expected[name].double()).abs().max().item() for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= atol, f"{what}: {worst} is {errors[worst]:.2e} off, more than {atol:.0e}"

"""Small jobs for tests: configurations composed as users compose them, and engines built from them."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import reference
import torch
from deepspeed.utils import safe_get_full_grad
from hydra.core.override_parser.overrides_parser import OverridesParser

from distllm.config import compose, validate
from distllm.config.schema import Config, Model
from distllm.engine.engine import Engine, StepResult
from distllm.engine.flat import FlatEngine
from distllm.engine.microbatch import Microbatch
from distllm.engine.zero import ZeroEngine
from distllm.layout.grid import Grid
from distllm.layout.groups import Groups, create_groups, release_groups
from distllm.layout.place import Box, Place
from distllm.objectives import create_objective
from distllm.trainer.build import build_engine as build

VOCAB_SIZE = 300
CONFIGS = "DISTLLM_TEST_CONFIGS"  # environment variable: folder of a session's composed configs (conftest.py)
TIMEOUT = timedelta(seconds=60)

# Small, and such that rounding stays rounding. Adam divides a gradient by its own size: where a gradient is
# only rounding noise, the update is noise of the size of the learning rate. An epsilon far above the noise of
# fp32 gradients (1e-9 here) and below their size (1e-3) keeps such elements from moving.
SMALL_JOB = (
    "model=tiny",
    "tokenizer=bytes",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",  # 4 microbatches without data parallelism, 2 with two ranks
    "optimizer.lr=0.003",
    "optimizer.epsilon=1e-6",
    "optimizer.clip_grad=0.3",  # below the norms that occur: clipping is active
    "zero.bucket_size=20_000",  # several buckets
    "zero.persistence_threshold=0",
)
SMALL_GPT2 = (
    "model=gpt2_124m",
    "model.num_layers=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.seq_length=32",
)


@dataclass(frozen=True)
class Trace:
    """What a run leaves for comparison: per step loss and gradient norm; by canonical name the gradients of
    the first step, before clipping, and the weights after the last."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def even_weights(labels: torch.Tensor) -> torch.Tensor:
    """Those of a mean over all labels."""
    return torch.full(labels.shape, 1 / labels.numel())


def make_config(*overrides: str) -> Config:
    """The small job with overrides, as composed from the command line.

    Hydra takes longer than a step of training: it composes each choice of groups once in a session of tests,
    for all ranks.
    """
    texts = [*SMALL_JOB, *overrides]
    settings = [text for text in texts if "." in text.partition("=")[0]]
    request = compose.parse("train", [text for text in texts if text not in settings])
    values = pickle.loads(_composed(request))
    for text in settings:
        override = OverridesParser.create().parse_override(text)
        section, setting = override.key_or_group.split(".")
        values[section][setting] = override.value()
    return validate.job(values, [], dict, request.verb, request.world_size)


def _composed(request: compose.Request) -> bytes:
    """The values of a request, pickled; from a file if any rank has composed it before."""
    file = Path(
        os.environ.get(CONFIGS, "nowhere"), hashlib.sha256(repr(request.overrides).encode()).hexdigest()
    )
    if not file.parent.is_dir():  # in no session of tests
        return pickle.dumps(compose.values_of(request)[0])
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one rank composes while the others wait for it
        if not file.is_file():
            partial = file.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(compose.values_of(request)[0]))
            partial.rename(file)
    return file.read_bytes()


def global_batch(step: int, config: Config) -> torch.Tensor:
    """[global_batch, seq + 1] tokens of a small, learnable alphabet, the same under every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    return torch.randint(0, 16, shape, generator=generator)


def microbatches(step: int, config: Config, groups: Groups) -> list[Microbatch]:
    """This rank's part of the global batch of `step`."""
    size, dp_size = config.train.micro_batch_size, groups.grid.data
    batch = global_batch(step, config).split(size)
    return [Microbatch(tokens.to(device())) for tokens in batch[groups.coordinates.data :: dp_size]]


def device() -> torch.device:
    """That of this rank in the world that is started."""
    on_gpu = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def build_engine(config: Config, vocab_size: int = VOCAB_SIZE) -> Engine:
    """Model and engine of a config in a world that is started; `finish` undoes it."""
    grid = Grid.of(config.parallel, torch.distributed.get_world_size())
    groups = create_groups(grid, TIMEOUT, config.parallel.virtual_pipeline)
    return build(config, vocab_size, groups, device(), create_objective(config), _never)


def _never(problem: str) -> None:
    raise AssertionError(problem)


def finish(engine: Engine) -> None:
    engine.release()
    release_groups(engine.groups)
    gc.collect()


def train(
    engine: Engine,
    config: Config,
    steps: int,
    learning_rate: float | None = None,
    batch_of: Callable[[int, Config, Groups], list[Microbatch]] = microbatches,
) -> Trace:
    """`steps` updates at a constant learning rate. batch_of: a rank's microbatches of a step."""
    results: list[StepResult] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(steps):
        batch = batch_of(step, config, engine.groups)
        with captured_gradients(engine) as captured:
            results.append(engine.train_step(batch, learning_rate or config.optimizer.lr))
        gradients = gradients or _put_together(captured)
    return Trace(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        gradients,
        gather_weights(engine),
    )


def train_cases(rank: int, cases: list[tuple[str, ...]], steps: int = 10) -> list[Trace]:
    """Several jobs in one start of the ranks; all ranks return the same."""
    traces = []
    for overrides in cases:
        config = make_config(*overrides)
        engine = build_engine(config)
        traces.append(train(engine, config, steps))
        finish(engine)
    return traces


# Of each piece: canonical name, global shape, boxes that it covers, its elements in flat order.
Pieces = list[tuple[str, tuple[int, ...], list[Box], torch.Tensor]]


@contextmanager
def captured_gradients(engine: Engine) -> Iterator[Pieces]:
    """This rank's gradients of the step inside, complete and not yet clipped."""
    pieces: Pieces = []

    def capture(place: Place, start: int, gradient: torch.Tensor) -> None:
        flat = gradient.detach().float().flatten().to("cpu", copy=True)
        pieces.append((place.name, place.global_shape, place.boxes(start, start + flat.numel()), flat))

    owner: Any
    if isinstance(engine, FlatEngine):
        owner, method = engine, "_global_grad_norm"
        found = [(piece.place, piece.start, piece.gradient) for piece in engine.pieces]
        parts = lambda: found  # noqa: E731
    else:
        assert isinstance(engine, ZeroEngine), f"no way is known to the gradients of {type(engine)}"
        owner, method = engine.deepspeed, "step"
        places = engine.places
        parts = lambda: [(place, 0, safe_get_full_grad(p)) for p, place in places.items()]  # noqa: E731
    original = getattr(owner, method)

    def capture_first() -> Any:
        for part in parts():
            capture(*part)
        return original()

    setattr(owner, method, capture_first)
    try:
        yield pieces
    finally:
        setattr(owner, method, original)


def gather_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """fp32 weights of the whole model by canonical name, put together from every rank's fragments."""
    return _put_together(
        [
            (
                f.place.name,
                f.place.global_shape,
                f.place.boxes(f.start, f.stop),
                f.tensors["weight"].cpu().clone(),
            )
            for f in engine.fragments()
        ]
    )


def _put_together(mine: Pieces) -> dict[str, torch.Tensor]:
    """Whole tensors by canonical name, from the pieces of all ranks; replicas must agree.

    To 1e-6: equal gradients give replicas equal updates up to an ulp, since ZeRO puts a parameter elsewhere
    in the flat buffer of each stage, and vectorised kernels round the ends of a buffer differently.
    """
    everyone: list[Pieces] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, mine)
    weights: dict[str, torch.Tensor] = {}
    for name, global_shape, boxes, flat in (item for part in everyone for item in part):
        whole = weights.setdefault(name, torch.full(global_shape, float("nan")))
        begin = 0
        for box in boxes:
            index = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            piece = flat[begin : begin + box.numel].view(box.sizes)
            is_new = torch.isnan(whole[index])
            torch.testing.assert_close(whole[index][~is_new], piece[~is_new], rtol=1e-6, atol=1e-6)
            whole[index] = piece
            begin += box.numel
    assert not any(torch.isnan(w).any() for w in weights.values()), "the fragments do not cover the model"
    return weights


def take_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """This rank's sums over backward passes at stage 0, by canonical name, in the shapes of parameters; the
    next sums begin at 0."""
    assert isinstance(engine, FlatEngine), "DeepSpeed keeps gradients elsewhere"
    taken = {place.name: engine.gradients[parameter].clone() for parameter, place in engine.places.items()}
    for flat in engine.flat_gradients:
        flat.zero_()
    return taken


def assert_weights_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, atol: float, what: str
) -> None:
    """Equal names, and every element within `atol`; the message names the worst parameter."""
    assert actual.keys() == expected.keys(), what
    errors = {name: (actual[name].double() - expected[name].double()).abs().max().item() for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= atol, f"{what}: {worst} is {errors[worst]:.2e} off, more than {atol:.0e}"


def assert_traces_equal(actual: Trace, expected: Trace, what: str, slack: float = 1) -> None:
    """fp32 runs of one job under two layouts. slack: how many times further apart they may be.

    Losses and norms are sums of some 1e4 terms in another order: a few ulp (1e-7) apart in the first step,
    more with every step; 1e-5 relative leaves a decade. Gradients of the first step: 1e-5 of the tensor's
    norm, for the same reason. Weights: ten updates of at most lr = 3e-3, whose relative error is that of a
    gradient over its root mean square, 1e-4 at worst (see SMALL_JOB on epsilon): 10 * 3e-3 * 1e-4 = 3e-6;
    1e-5 is asked.
    """
    for name, numbers in (("losses", "losses"), ("gradient norms", "grad_norms")):
        pairs = zip(getattr(actual, numbers), getattr(expected, numbers), strict=True)
        for step, (a, b) in enumerate(pairs, 1):
            is_equal = abs(a - b) <= slack * 1e-5 * abs(b)
            assert is_equal, f"{what}: {name} of step {step}: {a!r}, expected {b!r}"
    assert actual.gradients.keys() == expected.gradients.keys(), what
    for name, gradient in expected.gradients.items():
        error = ((actual.gradients[name] - gradient).norm() / gradient.norm()).item()
        assert error <= slack * 1e-5, f"{what}: first gradient of {name} is {error:.1e} of its norm off"
    assert_weights_close(actual.weights, expected.weights, atol=slack * 1e-5, what=what)


def reference_shape(model: Model) -> reference.Shape:
    """The same model for the implementation from scratch."""
    return reference.Shape(
        layers=model.num_layers,
        heads=model.num_attention_heads,
        groups=model.num_query_groups,
        head_dim=model.resolved_head_dim,
        norm=model.normalization,
        norm_epsilon=model.norm_epsilon,
        positions=model.position_embedding,
        rope_base=model.rope_base,
        activation=model.activation,
        tied=model.tie_embeddings,
        vocab_size=VOCAB_SIZE,
    )

"""Configs for tests of the plan, composed as `distllm check` composes them."""

from collections.abc import Mapping

from distllm.config import compose
from distllm.config.schema import Config
from distllm.optimizers.adamw import ADAMW
from distllm.plan.held import Held

LLAMA_VOCABULARY = 128_256


def held(shapes: Mapping[str, tuple[int, ...]]) -> Held:
    """Parameters by themselves, in AdamW's groups: matrices decay, vectors do not."""
    return Held(shapes, {name: ADAMW.group_of(len(shape) > 1) for name, shape in shapes.items()}, 2)


def config_of(*overrides: str) -> Config:
    """A legal job, of 8 layers if nothing else is said; `world_size=N` is among the overrides."""
    return compose.load(compose.parse("check", ("model.num_layers=8", *overrides)))


def llama(name: str, *overrides: str) -> Config:
    vocabulary = f"tokenizer.vocab_size={LLAMA_VOCABULARY}"
    request = compose.parse("check", (f"model={name}", vocabulary, "train.precision=bf16", *overrides))
    return compose.load(request)

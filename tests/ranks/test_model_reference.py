"""The model, against one written from scratch in plain PyTorch (reference.py): logits, loss, all gradients.

The reference computes in float64, ours in fp32. Tolerances: an fp32 dot product of 64 to 300 terms is off by
some 1e-6 relative to its terms, a few layers deep by some 1e-5; gradients add a backward pass over that.
"""

from __future__ import annotations

import dataclasses

import jobs
import pytest
import reference
import torch
from harness import run_ranks
from torch import Tensor

LLAMA = ("model=tiny",)
GPT2 = (
    "model=gpt2_124m",
    "model.num_layers=3",
    "model.hidden_size=48",
    "model.ffn_hidden_size=192",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.seq_length=32",
)
SHAPES = {
    "llama": LLAMA,
    "llama, tied": (*LLAMA, "model.tie_embeddings=true"),
    "llama, one key-value head": (*LLAMA, "model.num_query_groups=1"),
    "llama, wide heads": (*LLAMA, "model.head_dim=32"),
    "gpt2": GPT2,
    "gpt2, untied, exact gelu": (*GPT2, "model.tie_embeddings=false", "model.activation=gelu"),
}


@dataclasses.dataclass
class Passes:
    """One forward and backward pass. loss: mean over tokens. Gradients by canonical name."""

    weights: dict[str, Tensor]
    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def our_passes(rank: int, overrides: tuple[str, ...]) -> Passes:
    config = jobs.make_config(
        *overrides, "zero.stage=0", "train.global_batch_size=3", "train.micro_batch_size=3"
    )
    engine = jobs.build_engine(config)
    # Away from the initial point, where norms are all 1 and biases all 0 and errors in them would not show.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in engine.places:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    tokens = jobs.global_batch(0, config)
    logits = engine.logits(tokens[:, :-1], jobs.VOCAB_SIZE)
    named = {place.name: parameter for parameter, place in engine.places.items()}
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    labels = tokens[:, 1:]
    loss = engine.chunks[0](
        tokens[:, :-1],
        torch.arange(tokens.size(1) - 1).expand(3, -1),
        None,
        labels=labels,
        loss_mask=jobs.even_weights(labels),
    )
    loss.backward()
    gradients = jobs.take_gradients(engine)
    jobs.finish(engine)
    return Passes(weights, logits, loss.item(), gradients)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients(name: str) -> None:
    config = jobs.make_config(*SHAPES[name], "train.global_batch_size=3", "train.micro_batch_size=3")
    (ours,) = run_ranks(1, our_passes, SHAPES[name])
    weights = {n: w.double().requires_grad_() for n, w in ours.weights.items()}
    shape, tokens = jobs.reference_shape(config.model), jobs.global_batch(0, config)

    expected = reference.logits(weights, tokens[:, :-1], shape)
    torch.testing.assert_close(ours.logits.double(), expected, rtol=1e-5, atol=2e-5)

    loss = reference.loss(weights, tokens, shape)
    assert ours.loss == pytest.approx(loss.item(), rel=1e-6)

    loss.backward()
    for parameter, weight in weights.items():
        assert weight.grad is not None, parameter
        error = (ours.gradients[parameter].double() - weight.grad).norm() / weight.grad.norm()
        assert error < 2e-5, f"gradient of {parameter} is {error:.1e} off"

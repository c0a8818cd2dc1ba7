"""AdamW, decay groups and clipping against their definitions, computed independently in float64."""

from __future__ import annotations

import math

import jobs
import pytest
import torch
from harness import run_ranks
from torch import Tensor

BETAS, EPSILON, DECAY, CLIP, RATE = (0.9, 0.95), 1e-6, 0.1, 0.3, 0.003
STEPS = 3


def trained_with_gradients(
    rank: int, stage: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]], list[float]]:
    """Weights before and after every step, raw gradients of every step, reported norms."""
    config = jobs.make_config("zero.stage=0", "train.micro_batch_size=16", f"optimizer.weight_decay={DECAY}")
    shadow = jobs.build_engine(config)  # computes the gradients; never steps
    jobs.finish(shadow)
    config = jobs.make_config(
        f"zero.stage={stage}", "train.micro_batch_size=16", f"optimizer.weight_decay={DECAY}"
    )
    engine = jobs.build_engine(config)
    weights, gradients, norms = [jobs.gather_weights(engine)], [], []
    for step in range(STEPS):
        with torch.no_grad():
            for parameter, place in shadow.places.items():
                parameter.copy_(weights[-1][place.name].reshape(parameter.shape))
        (batch,) = jobs.microbatches(step, config, shadow.groups)
        mean = jobs.even_weights(batch.labels)
        shadow.chunks[0](batch.inputs, batch.positions, None, labels=batch.labels, loss_mask=mean).backward()
        taken = jobs.take_gradients(shadow)
        gradients.append({name: raw.view_as(weights[-1][name]) for name, raw in taken.items()})
        norms.append(engine.train_step([batch], RATE).grad_norm)
        weights.append(jobs.gather_weights(engine))
    jobs.finish(engine)
    return weights, gradients, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_update_is_adamw_after_clipping(stage: int) -> None:
    ((weights, gradients, norms),) = run_ranks(1, trained_with_gradients, stage)
    first = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights[0].items()}
    second = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights[0].items()}
    for step in range(STEPS):
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients[step].values()))
        assert norms[step] == pytest.approx(norm, rel=1e-5)
        assert norm > CLIP, "the test must clip"
        for name, raw in gradients[step].items():
            gradient = raw.double() * CLIP / norm
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            mean = first[name] / (1 - BETAS[0] ** (step + 1))
            variance = second[name] / (1 - BETAS[1] ** (step + 1))
            is_matrix = not name.endswith(("layernorm.weight", ".bias"))
            before = weights[step][name].double()
            expected = before * (1 - RATE * DECAY if is_matrix else 1)
            expected = expected - RATE * mean / (variance.sqrt() + EPSILON)
            # fp32 gradients are up to 1e-9 off, a millionth of the largest, and an update amplifies that
            # by at most lr / epsilon where the gradient is about zero.
            actual = {name: weights[step + 1][name]}
            jobs.assert_weights_close(
                actual, {name: expected}, atol=1e-9 * RATE / EPSILON, what=f"step {step + 1}"
            )


def overfit(rank: int) -> list[float]:
    config = jobs.make_config(
        "train.global_batch_size=4", "train.micro_batch_size=2", "optimizer.clip_grad=1", "zero.stage=2"
    )
    engine = jobs.build_engine(config)
    batch = jobs.microbatches(0, config, engine.groups)
    losses = [engine.train_step(batch, 3e-3).loss for _ in range(150)]
    jobs.finish(engine)
    return losses


def test_overfitting_four_sequences_drives_the_loss_to_zero() -> None:
    (losses,) = run_ranks(1, overfit)
    assert losses[0] > 5
    assert losses[-1] < 0.02, f"still at {losses[-1]:.3f} nats"

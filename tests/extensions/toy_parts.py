"""A family, an optimizer and an objective that distllm does not know, as a plugin brings them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distllm.config.problems import Problem
from distllm.config.registry import FAMILIES, OBJECTIVES, OPTIMIZERS
from distllm.config.schema import Model, Optimizer
from distllm.engine.microbatch import Microbatch
from distllm.engine.objective import Objective
from distllm.layout.parameter import Parameter
from distllm.model.families.decoder import Decoder
from distllm.optimizers import Recipe


def has_rotary_positions(model: Model) -> Iterator[Problem]:
    if model.position_embedding != "rope":
        rule = "must be rope in the family toy"
        yield Problem(
            "model.position_embedding", model.position_embedding, rule, "model.position_embedding=rope"
        )


class ToyFamily(Decoder):
    """A decoder whose feed-forward nets have a learned scale for each channel of what they give."""

    rules = (*Decoder.rules, has_rotary_positions)
    # The scale belongs to the net itself, which runs around its projections.
    layer_order = (*Decoder.layer_order[:4], "mlp", *Decoder.layer_order[4:])

    def layer(self, model: Model, number: int) -> list[Parameter]:
        entries = super().layer(model, number)
        first = next(i for i, entry in enumerate(entries) if entry.module.endswith("mlp.linear_fc1"))
        name = f"decoder.layers.{number}.mlp.scale"
        entries.insert(first, Parameter(name, (model.hidden_size,), "vector", 0.5, is_constant=True))
        return entries

    def layer_spec(self, model: Model, number: int) -> Any:
        from toy_layer import ScaledFeedForward

        spec = super().layer_spec(model, number)
        spec.submodules.mlp = ScaledFeedForward
        return spec


class Momentum(Recipe):
    """Gradient descent with momentum, which is `betas[0]`."""

    states = ("momentum_buffer",)

    def build(self, groups: Sequence[Sequence[nn.Parameter]], settings: Optimizer) -> torch.optim.Optimizer:
        decays = (settings.weight_decay, 0.0)
        return torch.optim.SGD(
            [{"params": list(g), "weight_decay": decay} for g, decay in zip(groups, decays, strict=True)],
            lr=settings.lr,
            momentum=settings.betas[0],
        )


class Focal(Objective):
    """Count tokens that are predicted well less (Lin et al. 2017, arXiv:1708.02002): no weights say it."""

    def loss_weights(self, batch: Microbatch) -> Tensor | None:
        return None

    def loss(self, output: Tensor, batch: Microbatch) -> Tensor:
        assert batch.loss_weights is not None, "prepared microbatches have weights"
        return ((1 - torch.exp(-output)) ** 2 * output * batch.loss_weights).sum()


FAMILIES.register("toy", ToyFamily())
OPTIMIZERS.register("toy", Momentum())
OBJECTIVES.register("toy", Focal)

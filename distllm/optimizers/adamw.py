"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distllm.config.schema import Optimizer
from distllm.optimizers.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn


class AdamW(Recipe):
    """PyTorch's, in one kernel per group; norms and biases are not decayed."""

    states = ("exp_avg", "exp_avg_sq")

    def build(self, groups: Sequence[Sequence[nn.Parameter]], settings: Optimizer) -> torch.optim.Optimizer:
        import torch

        decayed, others = groups
        return torch.optim.AdamW(
            [
                {"params": list(decayed), "weight_decay": settings.weight_decay},
                {"params": list(others), "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.epsilon,
            fused=True,
        )


ADAMW = AdamW()

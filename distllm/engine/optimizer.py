"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from distllm.config.schema import Optimizer
from distllm.layout.place import Place


def is_decayed(place: Place) -> bool:
    """Matrices decay; norms and biases do not. Told by the global shape: a bias cut by tensor parallelism and
    flattened by ZeRO is still a bias."""
    return len(place.global_shape) >= 2 and not place.name.endswith(".bias")


def create_adamw(
    places: Mapping[nn.Parameter, Place],
    masters: Mapping[nn.Parameter, nn.Parameter],
    config: Optimizer,
) -> torch.optim.AdamW:
    """AdamW over `masters` (fp32 copies, or the parameters themselves), in two groups: decayed and not.

    The groups exist on every rank in the same order, even where one is empty: ZeRO's collectives count them.
    """
    groups: list[list[nn.Parameter]] = [[], []]
    for parameter, place in places.items():
        groups[0 if is_decayed(place) else 1].append(masters[parameter])
    return torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": config.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )

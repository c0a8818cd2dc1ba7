"""Initial weights from the seed and the parameter's canonical name: equal under every layout.

A rank draws the whole parameter and keeps its part, so that no layout, no order of construction and no
number of ranks shows in the weights. Values are drawn on the parameter's device: equal on all GPUs and
equal on all CPUs, but not equal between the two kinds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import nn

from distllm.config.schema import Model
from distllm.layout.place import Place

# Projections back into the residual stream, damped by the number of residual additions.
RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(places: Mapping[nn.Parameter, Place], model: Model, seed: int) -> None:
    """Fill every parameter in place (Radford et al. 2019, section 2.3; Llama uses the same scheme)."""
    for parameter, place in places.items():
        if place.name.endswith("layernorm.weight"):
            parameter.fill_(1.0)
        elif place.name.endswith(".bias"):
            parameter.zero_()
        else:
            whole = torch.empty(place.global_shape, dtype=torch.float32, device=parameter.device)
            whole.normal_(
                0.0, _std(place.name, model), generator=_generator(place.name, seed, parameter.device)
            )
            part = whole[
                tuple(slice(o, o + n) for o, n in zip(place.offsets, place.local_shape, strict=True))
            ]
            parameter.copy_(part.reshape(parameter.shape))


def _std(name: str, model: Model) -> float:
    damping = math.sqrt(2 * model.num_layers) if name.endswith(RESIDUAL_PROJECTIONS) else 1.0
    return model.init_std / damping


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    # 63 bits: torch takes seeds as signed 64-bit integers.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)

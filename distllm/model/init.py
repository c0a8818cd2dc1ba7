"""Initial weights from the seed and the parameter's canonical name: equal under every layout.

A rank draws the whole parameter and keeps its part, so that the weights do not depend on the layout, the
order of construction or the number of ranks. Values are drawn on the parameter's device: equal on all GPUs
and equal on all CPUs, but not equal between the two kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from distllm.layout.parameter import Parameter
from distllm.layout.place import Place


@torch.no_grad()
def initialize_weights(
    entries: Mapping[nn.Parameter, Parameter], places: Mapping[nn.Parameter, Place], seed: int
) -> None:
    """Fill every parameter in place, as its entry says.

    Radford et al. 2019, section 2.3; Llama uses the same scheme.
    """
    for parameter, entry in entries.items():
        if entry.is_constant:
            parameter.fill_(entry.initial)
            continue
        generator = _generator(entry.name, seed, parameter.device)
        whole = torch.empty(entry.shape, dtype=torch.float32, device=parameter.device)
        whole.normal_(0.0, entry.initial, generator=generator)
        place = places[parameter]
        part = whole[tuple(slice(o, o + n) for o, n in zip(place.offsets, place.local_shape, strict=True))]
        parameter.copy_(part.reshape(parameter.shape))


def _generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    # 63 bits: torch takes seeds as signed 64-bit integers.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)

"""Initial weights from the seed, the parameter's canonical name and the element's number in the parameter.

They are equal under every layout, and a rank draws its part of a parameter without the rest: a counter-based
generator (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") starts at any element.
They are drawn on the CPU, whatever the device, so they are equal on all of them.

A core draws some 5e8 elements a second: half of it is the generator, half the look-up in the table below.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distllm.layout.parameter import Parameter
from distllm.layout.place import Box, Place, Shape

BLOCK = 16  # elements of one count of the generator: four numbers of 64 bits, 16 bits each
ELEMENTS_AT_ONCE = 1 << 16  # whose random bits and values stay in a core's cache


@torch.no_grad()
def initialize(parameter: nn.Parameter, entry: Parameter, place: Place, seed: int) -> None:
    """Fill this rank's part of a parameter, as its entry says.

    Radford et al. 2019, section 2.3; Llama uses the same scheme.
    """
    if entry.is_constant:
        parameter.fill_(entry.initial)
        return
    part = np.empty(parameter.numel(), np.float32)
    begin = 0
    for box in place.boxes(0, parameter.numel()):
        for start, stop in runs(entry.shape, box):
            draw_normal(seed, entry.name, start, part[begin : begin + stop - start])
            begin += stop - start
    part *= np.float32(entry.initial)
    parameter.copy_(torch.from_numpy(part).view(parameter.shape))


def runs(shape: Shape, box: Box) -> Iterator[tuple[int, int]]:
    """Yield the flat elements [start, stop) of a row-major array that a box of it covers, in order."""
    # Dims after the first one that the box cuts are contiguous with it.
    cut = max((dim for dim, size in enumerate(box.sizes) if size != shape[dim]), default=0)
    length = math.prod(box.sizes[cut:])
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    for index in np.ndindex(*box.sizes[:cut]):
        start = first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        yield start, start + length


def draw_normal(seed: int, name: str, start: int, out: NDArray[np.float32]) -> None:
    """Write elements start, start + 1, ... of the parameter's stream, standard normal, into `out`."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
    table = _quantiles()
    skipped = start % BLOCK
    generator = np.random.Philox(key=key, counter=start // BLOCK)
    done = 0
    while done < len(out):
        number = min(len(out) - done, ELEMENTS_AT_ONCE - skipped)
        bits = generator.random_raw(-(-(skipped + number) // BLOCK) * BLOCK // 4)
        lanes = bits.astype("<u8", copy=False).view("<u2")[skipped : skipped + number]
        np.take(table, lanes, out=out[done : done + number], mode="clip")  # no other mode writes unbuffered
        done, skipped = done + number, 0


@cache
def _quantiles() -> NDArray[np.float32]:
    """Return the 65,536 values that are drawn: as many quantiles of the normal distribution, variance 1.

    A weight in bf16 has fewer values within as many standard deviations, and a sum over a row of a matrix is
    as normal as with finer ones. The largest is 4.3.
    """
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    values: Tensor = torch.special.ndtri(middles)
    return (values / values.square().mean().sqrt()).numpy().astype(np.float32)

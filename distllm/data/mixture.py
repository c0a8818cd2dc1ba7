"""Which source each global sample is drawn from, and which of that source's samples it is. Pure arithmetic.

Sample n of a blend lies at the point of [0, 1) that n's binary digits, reversed, spell (van der Corput 1935).
Each source owns an interval as long as its share. Any 2**p samples from a multiple of 2**p on are an even
grid of points, of which an interval holds its share to less than two: so proportions hold over short windows,
and nothing drifts. How many samples before n fell into an interval follows from n's digits: no table grows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

NUM_BITS = 32
ONE = 1 << NUM_BITS  # the end of [0, 1), in units of 2**-32
DIGITS = np.arange(NUM_BITS, dtype=np.uint64)


@dataclass(frozen=True)
class Blend:
    """From sample `first` on, until the next blend begins, samples are drawn with `weights`."""

    first: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Draws:
    """The sources that samples are drawn from.

    names: of all sources that any blend has, sorted.
    sources: int64 [n], indices into names.
    source_samples: int64 [n], how many samples of that source came before, over all blends.
    """

    names: list[str]
    sources: np.ndarray
    source_samples: np.ndarray


def draw(samples: np.ndarray, blends: Sequence[Blend]) -> Draws:
    """Draw the sources of global `samples`, int64 [n]. blends: in order, the first from sample 0 on."""
    assert [blend.first for blend in blends][:1] == [0], "the first blend begins with sample 0"
    names = sorted({name for blend in blends for name in blend.weights})
    sources = np.zeros(len(samples), np.int64)
    source_samples = np.zeros(len(samples), np.int64)
    before = np.zeros(len(names), np.int64)  # samples of each source in the blends before
    ends: list[int | None] = [*(blend.first for blend in blends[1:]), None]
    for blend, end in zip(blends, ends, strict=True):
        bounds = _bounds(blend.weights, names)
        chosen = (samples >= blend.first) & ((samples < end) if end is not None else True)
        positions = (samples[chosen] - blend.first).astype(np.uint64)
        if len(positions):
            points = _reversed(positions & np.uint64(ONE - 1))
            # Sources of weight 0 have empty intervals, which "right" passes over.
            drawn = np.searchsorted(bounds, points, side="right") - 1
            sources[chosen] = drawn
            if bounds[drawn[0] + 1] - bounds[drawn[0]] == ONE:  # the only source
                in_blend = positions.astype(np.int64)
            else:
                in_blend = _num_below(positions, bounds[drawn + 1]) - _num_below(positions, bounds[drawn])
            source_samples[chosen] = before[drawn] + in_blend
        if end is not None:
            before += _counts(end - blend.first, bounds)
    return Draws(names, sources, source_samples)


def counts_before(sample: int, blends: Sequence[Blend]) -> dict[str, int]:
    """Return how many of the global samples 0 to sample - 1 each source gave."""
    names = sorted({name for blend in blends for name in blend.weights})
    total = np.zeros(len(names), np.int64)
    ends = [*(blend.first for blend in blends[1:]), sample]
    for blend, end in zip(blends, ends, strict=True):
        total += _counts(max(0, min(end, sample) - blend.first), _bounds(blend.weights, names))
    return dict(zip(names, total.tolist(), strict=True))


def _bounds(weights: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    """Return uint64 [names + 1]: source i owns points [bounds[i], bounds[i + 1]), in units of 2**-32."""
    parts = [Fraction(weights.get(name, 0.0)) for name in names]  # exact: equal on every machine
    total = sum(parts)
    assert total > 0, f"one weight must be above 0: {weights}"
    return np.array([0, *(round(part / total * ONE) for part in accumulate(parts))], np.uint64)


def _counts(num_samples: int, bounds: np.ndarray) -> np.ndarray:
    """Return int64 [sources]: how many of the first `num_samples` samples of a blend each source gave."""
    below = _num_below(np.full(len(bounds), num_samples, np.uint64), bounds)
    return np.diff(below)


def _num_below(positions: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return int64 [n]: how many of range(positions[i]) lie at points below bounds[i]. Both uint64 [n].

    range(position) falls into blocks of 2**p numbers, one for each digit 1 of position: numbers that share
    the digits above p and take all values in the p below. Reversed, such a block is an even grid of 2**p
    points, 2**(32 - p) apart, whose offset the shared digits spell.
    """
    whole, rest = positions >> np.uint64(NUM_BITS), positions & np.uint64(ONE - 1)
    above = DIGITS + np.uint64(1)
    has_block = (rest[:, None] >> DIGITS) & np.uint64(1) == 1  # [n, 32]
    offsets = _reversed((rest[:, None] >> above) << above).astype(np.int64)
    spacings = (NUM_BITS - DIGITS).astype(np.int64)
    room = bounds.astype(np.int64)[:, None] - offsets
    points = np.maximum(0, (room + (1 << spacings) - 1) >> spacings)
    return (whole * bounds).astype(np.int64) + np.where(has_block, points, 0).sum(1)


def _reversed(values: np.ndarray) -> np.ndarray:
    """Return the 32 lowest binary digits of uint64 values, in reverse order."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        bits, kept = np.uint64(shift), np.uint64(mask)
        values = ((values >> bits) & kept) | ((values & kept) << bits)
    return values

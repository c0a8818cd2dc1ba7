"""The order of training: which sequence a global sample number is. Pure arithmetic, no stored shuffle.

A shuffle is a keyed bijection on range(size): a Feistel network on the next even number of bits, applied
again to whatever falls outside of the range (cycle walking; Black & Rogaway 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

NUM_ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Order:
    """What the order of one source's sequences hangs on: the job's seed and the source's name."""

    seed: int
    name: str
    shuffle: bool = True

    def key(self, epoch: int) -> int:
        """A hash of seed, name and epoch (both numbers below 2**32)."""
        return xxhash.xxh3_64_intdigest(self.name.encode(), seed=(self.seed << 32 | epoch) & MASK_64)


def permuted_index(position: int, size: int, key: int) -> int:
    """Where the bijection on range(size) that `key` names sends `position`."""
    return int(permuted_indices(np.array([position]), size, key)[0])


def permuted_indices(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """`permuted_index` of each position; int [n] to int64 [n]."""
    assert size > 0, f"a bijection needs a range that is not empty, not range({size})"
    assert np.all((positions >= 0) & (positions < size)), f"positions must lie in range({size})"
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    indices = _feistel(positions.astype(np.uint64), half_bits, key)
    # The domain is below 4 * size, so a walk is short: 4 applications at most on average.
    while np.any(outside := indices >= size):
        indices[outside] = _feistel(indices[outside], half_bits, key)
    return indices.astype(np.int64)


def sequence_numbers(
    epochs: np.ndarray, positions: np.ndarray, num_sequences: int, order: Order
) -> np.ndarray:
    """int64 [n]: which sequence stands at each position of each epoch; every epoch visits all of them."""
    if not order.shuffle:
        return positions
    sequences = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        sequences[chosen] = permuted_indices(positions[chosen], num_sequences, order.key(int(epoch)))
    return sequences


def _feistel(values: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    """A bijection on uint64 values of 2 * half_bits bits, whatever `_mix` is."""
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for round_number in range(1, NUM_ROUNDS + 1):
        round_key = np.uint64((key + round_number * GOLDEN) & MASK_64)
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return left << shift | right


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014) on uint64, whose products wrap around on purpose."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

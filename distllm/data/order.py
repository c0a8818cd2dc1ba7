"""The order of training: which sequence a global sample number is. Pure arithmetic, no stored shuffle.

A shuffle is a keyed bijection on range(size): a Feistel network over two digits, one modulo each of two
numbers whose product is hardly larger than size, applied again to the few values that fall outside of the
range (the generalised Feistel cipher and cycle walking of Black & Rogaway 2002).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xxhash

NUM_ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Order:
    """The inputs that determine the order of one source's sequences: the job's seed and the source's name."""

    seed: int
    name: str
    shuffle: bool = True

    def key(self, epoch: int) -> int:
        """Return a hash of seed, name and epoch (both numbers below 2**32)."""
        return xxhash.xxh3_64_intdigest(self.name.encode(), seed=(self.seed << 32 | epoch) & MASK_64)


def permuted_index(position: int, size: int, key: int) -> int:
    """Return the image of `position` under the bijection on range(size) that `key` selects."""
    return int(permuted_indices(np.array([position]), size, key)[0])


def permuted_indices(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Apply `permuted_index` to each position; int [n] to int64 [n]."""
    assert size > 0, f"a bijection needs a range that is not empty, not range({size})"
    assert np.all((positions >= 0) & (positions < size)), f"positions must lie in range({size})"
    rows = math.isqrt(size - 1) + 1 if size > 1 else 1
    columns = -(-size // rows)
    indices = _feistel(positions.astype(np.uint64), rows, columns, key)
    # Of the rows * columns values fewer than `rows` lie outside, so a second application is rare.
    while np.any(outside := indices >= size):
        indices[outside] = _feistel(indices[outside], rows, columns, key)
    return indices.astype(np.int64)


def sequence_numbers(
    epochs: np.ndarray, positions: np.ndarray, num_sequences: int, order: Order
) -> np.ndarray:
    """Return int64 [n]: the sequence at each position of each epoch; every epoch visits all sequences."""
    if not order.shuffle:
        return positions
    sequences = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        sequences[chosen] = permuted_indices(positions[chosen], num_sequences, order.key(int(epoch)))
    return sequences


def _feistel(values: np.ndarray, rows: int, columns: int, key: int) -> np.ndarray:
    """Apply a bijection on uint64 values below rows * columns; it is one whatever `_mix` is."""
    row: np.ndarray = values // np.uint64(columns)
    column: np.ndarray = values % np.uint64(columns)
    for round_number in range(1, NUM_ROUNDS + 1):
        round_key = np.uint64((key + round_number * GOLDEN) & MASK_64)
        if round_number % 2:
            row = (row + _mix(column ^ round_key) % np.uint64(rows)) % np.uint64(rows)
        else:
            column = (column + _mix(row ^ round_key) % np.uint64(columns)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer (Steele, Lea & Flood 2014) to uint64; products wrap around on purpose."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Fit the growth of a count or a time with the number of ranks: constant, logarithmic or linear. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GROWTHS: dict[str, Callable[[float], float]] = {
    "1": lambda n: 0.0,
    "log n": lambda n: math.log2(n),
    "n": lambda n: n,
}
# A faster growth is chosen only if it explains this fraction of what a slower one leaves unexplained.
EXPLAINS = 0.5


@dataclass(frozen=True)
class Fit:
    """constant + slope * growth(ranks), by least squares; of several growths the slowest that fits."""

    growth: str
    constant: float
    slope: float

    def at(self, ranks: int) -> float:
        return self.constant + self.slope * GROWTHS[self.growth](ranks)


def fit(ranks: Sequence[int], values: Sequence[float]) -> Fit:
    """Fit `values` at these numbers of ranks, at least three of them."""
    assert len(ranks) == len(values) >= 3, "three points tell a logarithm from a line"
    best, least = _least_squares("1", ranks, values)
    for growth in ("log n", "n"):
        candidate, error = _least_squares(growth, ranks, values)
        if candidate.slope > 0 and error < (1 - EXPLAINS) * least:
            best, least = candidate, error
    return best


def _least_squares(growth: str, ranks: Sequence[int], values: Sequence[float]) -> tuple[Fit, float]:
    """Return (the fit, its squared error; rounding counts as none)."""
    xs = [GROWTHS[growth](n) for n in ranks]
    x_mean, y_mean = sum(xs) / len(xs), sum(values) / len(values)
    spread = sum((x - x_mean) ** 2 for x in xs)
    product = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, values, strict=True))
    slope = product / spread if spread else 0.0
    found = Fit(growth, y_mean - slope * x_mean, slope)
    error = sum((found.at(n) - y) ** 2 for n, y in zip(ranks, values, strict=True))
    return found, 0.0 if error < 1e-18 * max(1.0, y_mean**2) else error

"""Which parameter's gradient was the first that is not finite; read only after a step has gone wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from distllm.layout.place import Place


class GradientWatch:
    """Sums up the elements of every gradient before it is reduced over ranks, at the cost of one more read.

    A sum is finite unless an element is not (or the sum overflows, which is as wrong). Nothing waits for the
    device until `first_non_finite` is called.
    """

    def __init__(self, places: Mapping[nn.Parameter, Place]) -> None:
        self.local_loss: Tensor | None = None
        self.injected_factor: float | None = None  # on all gradients of this rank, for tests of the guards
        self._sums: dict[str, Tensor] = {}
        for parameter, place in places.items():
            parameter.register_hook(partial(self._watch, place.name))

    def begin_step(self) -> None:
        self._sums = {}
        self.local_loss = None

    def first_non_finite(self) -> str | None:
        """Return what was not finite first on this rank in this step.

        That is "loss", or the canonical name of a parameter; None if everything was finite.
        """
        if self.local_loss is not None and not math.isfinite(self.local_loss.item()):
            return "loss"
        if not self._sums:
            return None
        is_finite = torch.isfinite(torch.stack(list(self._sums.values()))).tolist()
        return next((name for name, finite in zip(self._sums, is_finite, strict=True) if not finite), None)

    def _watch(self, name: str, gradient: Tensor) -> Tensor | None:
        if self.injected_factor is not None:
            gradient = gradient * self.injected_factor
        total = gradient.detach().sum()  # in the gradient's type: another would make a copy of it first
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        return None if self.injected_factor is None else gradient

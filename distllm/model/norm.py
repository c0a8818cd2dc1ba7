"""Normalisation layers in the form in which Megatron Core's layer spec builds them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[seq, batch, hidden] -> the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[seq, batch, hidden] -> the same."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)

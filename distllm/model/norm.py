"""Normalisation layers in the form in which Megatron Core's layer spec builds them.

Under sequence parallelism each tensor-parallel rank normalises its part of the sequence, so its gradient of
the norm's weight is a part of the sum. The weight passes through `copy_to_tensor_model_parallel_region`, the
identity whose backward sums over the ranks: the gradient is complete before ZeRO sees it. Without that the
gradient is wrong by most of its size, while the loss moves in the fifth digit only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from distllm.model.kernels import AS_WRITTEN, Kernels


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    kernels: Kernels = AS_WRITTEN

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map [seq/tp or seq, batch, hidden] to the same shape."""
        weight = summed_over_sequence(self.weight, self.sequence_parallel)
        kernels = self.kernels if self.training else AS_WRITTEN
        return kernels.rms_norm(x, weight, self.epsilon)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map [seq/tp or seq, batch, hidden] to the same shape."""
        weight = summed_over_sequence(self.weight, self.sequence_parallel)
        bias = summed_over_sequence(self.bias, self.sequence_parallel)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def summed_over_sequence(parameter: Tensor, sequence_parallel: bool) -> Tensor:
    """Return a parameter that all tensor-parallel ranks apply to their parts of the sequence."""
    if not sequence_parallel:
        return parameter
    result: Tensor = copy_to_tensor_model_parallel_region(parameter)
    return result

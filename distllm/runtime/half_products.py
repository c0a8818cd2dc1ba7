"""Multiply bf16 matrices in fp32 on a processor that has no units for bf16 (PyTorch 2.13).

There PyTorch converts element by element inside its loops: 8 to 20 times slower than fp32 (AMD EPYC with
AVX2, [64, 64] x [64, 128]: 460 us, converted first 54 us, fp32 29 us). The result is what such units give:
products and sums in fp32, rounded once at the end.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


@functools.cache  # the library lives as long as the process
def install() -> torch.library.Library | None:
    """Replace the kernels of three products on such a processor; nothing happens on others."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, kernel in (("mm", _mm), ("bmm", _bmm), ("addmm", _addmm)):
            library.impl(name, kernel, "CPU")
    return library


# `out=` leads to a kernel of its own, which is not replaced: other types go the way that they went before.
def _mm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a.float(), b.float()).to(a.dtype)
    return torch.mm(a, b, out=a.new_empty(a.size(0), b.size(1)))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.bfloat16:
        return torch.bmm(a.float(), b.float()).to(a.dtype)
    return torch.bmm(a, b, out=a.new_empty(a.size(0), a.size(1), b.size(2)))


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if a.dtype == b.dtype == torch.bfloat16:
        return torch.addmm(bias.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)
    out = a.new_empty(a.size(0), b.size(1))
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=out)

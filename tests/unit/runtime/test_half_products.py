"""bf16 products in fp32 are what products of bf16 values are, rounded once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch

from distllm.runtime import half_products


def matrices(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    """A rounding is half an ulp; sums in the type itself, fp32 or fp64, are in whatever order: 1e-5."""
    bias, a, b = matrices((7,), (5, 300), (300, 7), dtype=dtype)
    batch, other = matrices((3, 5, 300), (3, 300, 7), dtype=dtype)
    exact = a.double() @ b.double()
    for found, expected in (
        (half_products._mm(a, b), exact),
        (half_products._mm(a, b.t().contiguous().t()), exact),
        (half_products._bmm(batch, other), batch.double() @ other.double()),
        (half_products._addmm(bias, a, b), bias.double() + exact),
        (half_products._addmm(bias, a, b, beta=0.5, alpha=2), 0.5 * bias.double() + 2 * exact),
    ):
        assert found.dtype == dtype
        if dtype == torch.bfloat16:
            torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
        else:
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_types_are_not_mixed() -> None:
    a, b = matrices((5, 3), (3, 7), dtype=torch.bfloat16)
    for multiply in (half_products._mm, lambda x, y: half_products._addmm(y[0], x, y)):
        with pytest.raises(RuntimeError):
            multiply(a, b.float())


CHECK = """
import torch
from distllm.runtime import half_products
torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: {supported}
assert (half_products.install() is None) == {supported}
assert half_products.install() is half_products.install()
a, b = (torch.randn(n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (4, 8))
(loss := torch.nn.functional.linear(a, b, a[0, :8]).sum()).backward()
assert a.grad.dtype == torch.bfloat16 and b.grad.shape == b.shape and torch.isfinite(loss)
assert torch.randn(4, 64).mm(torch.randn(64, 2)).dtype == torch.float32
"""


@pytest.mark.parametrize("supported", [True, False])
def test_only_a_processor_without_units_needs_it(supported: bool, tmp_path: Path) -> None:
    """In a process of its own: kernels are replaced for a whole process."""
    code = CHECK.format(supported=supported)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=commands.environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

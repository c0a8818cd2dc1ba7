"""Variable-length FlashAttention on a GPU gives what one call per document gives, and training takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distllm.engine.microbatch import Microbatch
from distllm.model import attention
from distllm.model.attention import CausalAttention

pytestmark = pytest.mark.gpu
SEQ, BATCH, HEADS = 256, 2, 8
# In [BATCH * SEQ]: documents of 1, 99, 27, 1 and 128 tokens in the first sequence; a whole one.
STARTS = [0, 1, 100, 127, 128, 256, 512]


def heads_and_gradient(num_groups: int, head_dim: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and the gradient that arrives at the output."""
    generator = torch.Generator("cuda").manual_seed(5)
    query, key, value, gradient = (
        torch.randn(SEQ, BATCH, heads, head_dim, device="cuda", generator=generator).to(dtype)
        for heads in (HEADS, num_groups, num_groups, HEADS)
    )
    heads = [x.detach().requires_grad_() for x in (query, key, value)]
    return heads, gradient.flatten(2)


def output_and_gradients(heads: list[Tensor], gradient: Tensor, starts: Tensor | None) -> list[Tensor]:
    output = CausalAttention(None, 1, None, "self")(*heads, starts)
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in heads if x.grad is not None)]


def starts_on_gpu() -> Tensor:
    return torch.tensor(STARTS, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_groups", [8, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_equals_one_call_per_document(
    num_groups: int, head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against fp32, document by document, from the same rounded inputs. Inputs and outputs of bf16 are
    off by up to 2^-9 of themselves, and the backward pass rounds scores once more: 1e-2 as for the kernel
    without a mask (test_one_gpu.py). Sums over a group of heads add such errors in quadrature."""
    heads, gradient = heads_and_gradient(num_groups, head_dim, dtype)
    assert attention.has_varlen_kernel(heads[0])
    varlen = output_and_gradients(heads, gradient, starts_on_gpu())

    exact = [x.detach().float().requires_grad_() for x in heads]
    assert not attention.has_varlen_kernel(exact[0])
    expected = output_and_gradients(exact, gradient.float(), starts_on_gpu())

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: False)
    again = [x.detach().clone().requires_grad_() for x in heads]
    by_document = output_and_gradients(again, gradient, starts_on_gpu())
    assert len(varlen) == len(by_document) == len(expected) == 4
    for name, x, y, z in zip(("output", "query", "key", "value"), varlen, by_document, expected, strict=True):
        for way, found in (("varlen", x), ("by document", y)):
            error = ((found.float() - z).norm() / z.norm()).item()
            assert error < 1e-2, f"{name}, {way}: {error:.1e}"


def test_without_the_mask_it_is_far_off() -> None:
    heads, gradient = heads_and_gradient(2, 64, torch.bfloat16)
    masked, *_ = output_and_gradients(heads, gradient, starts_on_gpu())
    whole, *_ = output_and_gradients(heads, gradient, None)
    assert (masked - whole).norm() / masked.norm() > 0.1


def test_nothing_waits_for_the_device() -> None:
    heads, gradient = heads_and_gradient(2, 64, torch.bfloat16)
    tokens = torch.zeros(BATCH, SEQ + 1, dtype=torch.int64, device="cuda")
    starts = starts_on_gpu()
    output_and_gradients(heads, gradient, starts)  # what is loaded on first use may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        positions = Microbatch(tokens, document_starts=starts).positions
        output_and_gradients(heads, gradient, starts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert positions[0, 99:102].tolist() == [98, 0, 1]

"""Attention in blocks computes what PyTorch's kernel does, and all of its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.model import blocked_attention as module
from distllm.model.attention import CausalAttention, are_blocks_faster
from distllm.model.blocked_attention import BlockSize, blocked_attention
from distllm.model.kernels import AS_WRITTEN, compiled

HEAD_DIM = 16


def expected(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return context.permute(2, 0, 1, 3)


def tensors(seq: int, heads: int, groups: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """(query, key and value), and a gradient of the output."""
    generator = torch.Generator().manual_seed(seq * heads + groups)

    def random(num_heads: int) -> Tensor:
        return torch.randn(seq, 2, num_heads, HEAD_DIM, generator=generator).to(dtype)

    return [random(heads), random(groups), random(groups)], random(heads)


# One block, several, a last one that is short; one head per group and several; all heads at once and one.
@pytest.mark.parametrize("seq", [1, 40, 64, 200, 1100])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scores_per_block", [1, 1 << 18])
def test_output_and_gradients(
    seq: int, heads: int, groups: int, scores_per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.BLOCK_SIZES, torch.float32, BlockSize(64, scores_per_block))
    inputs, gradient = tensors(seq, heads, groups, torch.float32)
    query, key, value = (x.requires_grad_() for x in inputs)
    found, wanted = blocked_attention(query, key, value, 0.3), expected(query, key, value, 0.3)
    # fp32 sums over at most 1,100 keys in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    for mine, other in zip(
        torch.autograd.grad(found, inputs, gradient),
        torch.autograd.grad(wanted, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_change_nothing(dtype: torch.dtype) -> None:
    """Each block sees more keys than the one before; the first sees as many as it has queries."""
    inputs, gradient = tensors(300, 4, 2, dtype)
    query, key, value = (x.requires_grad_() for x in inputs)
    results = []
    for kernels in (compiled(pytest.fail), AS_WRITTEN):
        context = blocked_attention(query, key, value, 0.3, kernels)
        results.append([context, *torch.autograd.grad(context, inputs, gradient)])
    for found, wanted in zip(*results, strict=True):
        # Another approximation of exp, and in bf16 what it makes be rounded the other way: one in 2^8.
        tolerance = 5e-6 if dtype == torch.float32 else 2.0**-8
        assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(
    ("seq", "head_dim", "uses_blocks"), [(512, 64, True), (511, 64, False), (512, 32, False)]
)
def test_attention_takes_what_is_faster(seq: int, head_dim: int, uses_blocks: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(seq, 2, 2, head_dim, generator=generator) for _ in range(3))
    assert are_blocks_faster(query) == uses_blocks
    attention = CausalAttention(None, 1, None, "self")
    found = attention(query, key, value, None)
    wanted = expected(query, key, value, head_dim**-0.5).reshape(seq, 2, 2 * head_dim)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_strided_inputs_and_a_scale_of_one() -> None:
    """As they come out of the projection: views of one tensor."""
    mixed = torch.randn(70, 2, 3, 4 * HEAD_DIM, generator=torch.Generator().manual_seed(1))
    query, key, value = (mixed[..., i * HEAD_DIM : (i + 1) * HEAD_DIM] for i in range(3))
    found = blocked_attention(query, key, value, 1.0)
    torch.testing.assert_close(found, expected(query, key, value, 1.0), rtol=1e-5, atol=2e-6)


def test_bf16_is_within_twice_the_rounding_of_the_kernel() -> None:
    """Ours also rounds scores to 8 bits. They are sums of 16 products of normal numbers here, so about
    4 / 2^9 off, as much as rounding the probabilities costs both: twice the error, and no more."""
    inputs, gradient = tensors(200, 4, 2, torch.bfloat16)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        context = function(*leaves, 0.25)
        return [context.detach(), *torch.autograd.grad(context, leaves, gradient.to(dtype))]

    exact = results(expected, torch.float64)
    mine, other = results(blocked_attention, torch.bfloat16), results(expected, torch.bfloat16)
    for my_result, other_result, wanted in zip(mine, other, exact, strict=True):
        my_error, other_error = ((x.double() - wanted).norm() for x in (my_result, other_result))
        assert my_error < 2 * other_error

"""The loss in chunks against PyTorch's own on all logits, and what it never holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.model import loss as loss_module
from distllm.model.loss import VocabularyPart, linear_cross_entropy

SEQ, BATCH, HIDDEN, VOCAB, PADDED = 280, 5, 16, 90, 96


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """Of one rank: Megatron's mappings do nothing with it, but want it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor | None) -> Tensor:
    assert dist.group.WORLD is not None
    part = VocabularyPart(0, VOCAB, dist.group.WORLD)
    return linear_cross_entropy(hidden, weight, labels, token_weights, part, sequence_parallel=False)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 1,024 tokens each: one whole chunk and a rest."""
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 1)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels, token weights; some of these are 0."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(SEQ, BATCH, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    token_weights = torch.rand(BATCH, SEQ, generator=generator) * (torch.arange(SEQ) % 7 > 0)
    return hidden, weight, labels, token_weights


def on_all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[batch, seq], in fp64."""
    logits = (hidden.double() @ weight.double().t())[..., :VOCAB]
    return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """fp32: sums of 1,400 products in another order. bf16: its own 8 bits, in logits and in gradients."""
    hidden, weight, labels, token_weights = inputs(dtype)
    total = loss_of(hidden, weight, labels, token_weights)
    (total * 0.37).backward()  # as where a schedule divides by the number of microbatches
    found = [total.detach(), hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    expected = (on_all_logits(hidden, weight, labels) * token_weights).sum()
    (expected * 0.37).backward()
    for ours, theirs in zip(found, [expected.detach(), hidden.grad, weight.grad], strict=True):
        assert ours is not None
        assert theirs is not None
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < tolerance


@pytest.mark.usefixtures("small_chunks")
def test_losses_of_single_tokens() -> None:
    hidden, weight, labels, _ = inputs()
    with torch.no_grad():
        losses = loss_of(hidden, weight, labels, None)
    torch.testing.assert_close(
        losses.double(), on_all_logits(hidden, weight, labels).detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_of_single_tokens(dtype: torch.dtype, tolerance: float) -> None:
    """Of a function of the losses that weights cannot say: the tolerances are those of the weighted sum."""

    def objective(losses: Tensor) -> Tensor:
        return ((1 - torch.exp(-losses)) ** 2 * losses).sum()

    hidden, weight, labels, _ = inputs(dtype)
    found = torch.autograd.grad(objective(loss_of(hidden, weight, labels, None)), [hidden, weight])
    expected = torch.autograd.grad(objective(on_all_logits(hidden, weight, labels)), [hidden, weight])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < tolerance


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1, 1 << 24):
        monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", size)
        hidden, weight, labels, token_weights = inputs()
        loss_of(hidden, weight, labels, token_weights).backward()
        results.append((hidden.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_gradient_in_bf16_is_no_worse_for_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 chunks summed up in bf16 are off by 9e-3; rounding the sum once is off by 2e-3, here 1.7e-3."""
    monkeypatch.setattr(loss_module, "tokens_per_chunk", lambda *_: 22)
    hidden, weight, labels, token_weights = inputs(torch.bfloat16)
    loss_of(hidden, weight, labels, token_weights).backward()
    total = (on_all_logits(hidden, weight, labels) * token_weights).sum()
    (expected,) = torch.autograd.grad(total, [weight])
    assert weight.grad is not None
    off = (weight.grad.double() - expected.double()).norm() / expected.double().norm()
    assert off < 4e-3


def test_rows_that_are_no_tokens_are_never_predicted() -> None:
    hidden, weight, labels, token_weights = inputs()
    loss_of(hidden, weight, labels, token_weights).backward()
    assert weight.grad is not None
    assert weight.grad[:VOCAB].abs().sum() > 0
    assert (weight.grad[VOCAB:] == 0).all()


@pytest.mark.usefixtures("small_chunks")
def test_the_logits_of_all_tokens_never_exist() -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden, weight, labels, token_weights = inputs()
    with Largest():
        loss_of(hidden, weight, labels, token_weights).backward()
        loss_of(hidden, weight, labels, None).sum().backward()
    assert largest == 1024 * PADDED < SEQ * BATCH * PADDED

"""Attention inside documents, against the dense mask that is never made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distllm.model import attention
from distllm.model.attention import CausalAttention

SEQ, BATCH, HEADS, HEAD_DIM = 24, 2, 4, 8
# In [BATCH * SEQ]: documents of 1, 9, 1 and 13 tokens in the first sequence, a second that is one document.
STARTS = [0, 1, 10, 11, 24, 48]


def random_heads(num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        torch.randn(SEQ, BATCH, heads, HEAD_DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, num_groups, num_groups)
    )
    return query, key, value


def our_attention(query: Tensor, key: Tensor, value: Tensor, starts: list[int] | None) -> Tensor:
    mask = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    output: Tensor = CausalAttention(None, 1, None, "self")(query, key, value, mask)
    return output


def dense_attention(query: Tensor, key: Tensor, value: Tensor, starts: list[int]) -> Tensor:
    """The same in float64 with a mask [batch, 1, seq, seq]."""
    document = torch.tensor([sum(start <= token for start in starts) for token in range(BATCH * SEQ)])
    document = document.view(BATCH, 1, SEQ)
    mask = (document[..., :, None] == document[..., None, :]).tril()
    q, k, v = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return context.permute(2, 0, 1, 3).reshape(SEQ, BATCH, HEADS * HEAD_DIM)


@pytest.mark.parametrize("num_groups", [HEADS, 2, 1])
@pytest.mark.parametrize("starts", [STARTS, [0, 24, 48], list(range(49))])
def test_output_and_gradients_are_those_of_a_dense_mask(num_groups: int, starts: list[int]) -> None:
    """In fp32 against float64: sums of up to 24 terms of size 1, so 1e-6 and a decade."""
    ours, reference = random_heads(num_groups), random_heads(num_groups)
    weight = torch.linspace(-1, 1, HEADS * HEAD_DIM)  # otherwise softmax hides much of its gradient in sums
    output, expected = our_attention(*ours, starts), dense_attention(*reference, starts)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


def test_one_document_per_sequence_is_no_mask() -> None:
    heads = random_heads(2)
    torch.testing.assert_close(our_attention(*heads, [0, 24, 48]), our_attention(*heads, None))


def test_a_document_sees_nothing_of_the_others() -> None:
    """Bitwise: what a document gives does not depend on its neighbours' values."""
    query, key, value = (x.detach() for x in random_heads(2))
    before = our_attention(query, key, value, STARTS)
    for x in (query, key, value):
        x[0:10, 0] += 1
        x[:, 1] += 1
    after = our_attention(query, key, value, STARTS)
    assert torch.equal(before[10:, 0], after[10:, 0])
    assert not torch.isclose(before[1:10, 0], after[1:10, 0]).all()


def test_nothing_of_the_size_of_a_mask_is_made() -> None:
    """With 4096 tokens a mask of bytes has 16 MiB; the largest tensor here has 64 KiB."""
    seq, starts = 4096, torch.arange(0, 4097, 64, dtype=torch.int32)
    query = torch.randn(seq, 1, 1, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        CausalAttention(None, 1, None, "self")(query, query, query, starts)
    assert max(event.cpu_memory_usage for event in profile.events()) < 2**20


def test_the_varlen_kernel_is_called_without_reading_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data, which raise if read; torch checks the arguments. tests/gpu has the numbers."""
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query: True)
    with FakeTensorMode():
        query, key, value = random_heads(2)
        starts = torch.empty(len(STARTS), dtype=torch.int32)
        output = CausalAttention(None, 1, None, "self")(query, key, value, starts)
        assert output.shape == (SEQ, BATCH, HEADS * HEAD_DIM)
        output.sum().backward()
    for x in (query, key, value):
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("dtype", "is_expanded"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_fp32_on_a_gpu_gives_each_head_its_own_keys(
    dtype: torch.dtype, is_expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With groups PyTorch would make whole score matrices there; fake tensors need no GPU."""
    asked: list[tuple[int, bool]] = []

    def note(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, **_: object) -> Tensor:
        assert key.shape == value.shape
        asked.append((key.size(1), enable_gqa))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    with FakeTensorMode():
        query, key, value = (
            torch.empty(BATCH, heads, SEQ, HEAD_DIM, device="cuda", dtype=dtype) for heads in (HEADS, 2, 2)
        )
        attention.causal_attention(query, key, value, None)
    assert asked == [(HEADS, False) if is_expanded else (2, True)]


def test_expanded_keys_are_those_of_the_groups() -> None:
    """The expansion for fp32 on a GPU, in the order in which PyTorch's own groups take their heads."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in random_heads(2))
    found = attention.causal_attention(
        query, attention.per_head(key, HEADS), attention.per_head(value, HEADS), None
    )
    torch.testing.assert_close(found, attention.causal_attention(query, key, value, None))

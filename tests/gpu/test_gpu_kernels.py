"""On a GPU: kernels are compiled, not only tried; fp32 makes no score matrices; segments of memory grow."""

from __future__ import annotations

import jobs
import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from torch import Tensor

from distllm.model.attention import causal_attention
from distllm.model.kernels import compiled

pytestmark = pytest.mark.gpu
SHAPE = ("model.hidden_size=256", "model.ffn_hidden_size=704", "model.seq_length=64")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_training_falls_back_nowhere_and_follows_the_other(precision: str) -> None:
    """jobs.build_engine fails on the warning of a kernel that runs as written."""
    job = (*SHAPE, f"train.precision={precision}")
    cases = [(*job, f"train.compile={compiles}") for compiles in ("false", "true")]
    ((as_written, in_kernels),) = run_ranks(1, jobs.train_cases, cases, deadline_seconds=400, on_gpus=True)
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    assert in_kernels.losses == pytest.approx(as_written.losses, rel=tolerance)


def test_a_full_device_does_not_turn_compilation_off() -> None:
    told: list[str] = []
    swiglu = compiled(told.append).swiglu
    x = torch.randn(64, 512, device="cuda")
    expected = swiglu(x)
    too_large = torch.ones(1, device="cuda").expand(1 << 20, 1 << 20)  # takes 4 bytes, its result 2 TiB
    with pytest.raises(torch.OutOfMemoryError):
        swiglu(too_large)
    torch.testing.assert_close(swiglu(x), expected)
    assert told == []


def heads(seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query with 8 heads, key and value with 2, in fp32."""
    generator = torch.Generator("cuda").manual_seed(5)
    query, key, value = (
        torch.randn(1, heads, seq, 64, device="cuda", generator=generator, requires_grad=True)
        for heads in (8, 2, 2)
    )
    return query, key, value


def test_grouped_queries_in_fp32_hold_no_score_matrix() -> None:
    """At 8,192 tokens the scores of 8 heads are 2 GiB; queries, keys, values and gradients some 200 MiB."""
    query, key, value = heads(8192)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    causal_attention(query, key, value, None).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * 8192 * 8192 * 4 / 4


def test_grouped_queries_in_fp32_are_those_of_float64() -> None:
    ours, exact = heads(256), [x.detach().double().requires_grad_() for x in heads(256)]
    output = causal_attention(*ours, None)
    query, key, value = exact
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    weight = torch.linspace(-1, 1, 64, device="cuda")
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)
    for x, y in zip(ours, exact, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        error = (x.grad.double() - y.grad).norm() / y.grad.norm()
        assert error < 1e-5


def segments(rank: int) -> bool:
    torch.ones(1, device="cuda")
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    return bool(settings["expandable_segments"])


def test_segments_of_memory_grow() -> None:
    """The setting comes early enough to be heard."""
    assert run_ranks(1, segments, on_gpus=True) == [True]

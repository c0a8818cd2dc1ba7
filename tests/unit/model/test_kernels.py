"""Kernels compute what they say, compiled too; what cannot be compiled runs as it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distllm.model.kernels import AS_WRITTEN, Kernels, compiled, use_kernels
from distllm.model.norm import RMSNorm

SEQ, BATCH, GROUPS, HEADS_PER_GROUP, HEAD_DIM = 12, 2, 3, 2, 8


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def mixed_and_tables() -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(SEQ), 10.0 ** -torch.arange(HEAD_DIM // 2))
    tables = torch.stack([angles.cos(), angles.sin()])[:, :, None, None]
    return random(SEQ, BATCH, GROUPS * (HEADS_PER_GROUP + 2) * HEAD_DIM), tables


def never(text: str) -> None:
    raise AssertionError(text)


def test_heads_are_split_and_rotated() -> None:
    """By complex numbers: dims i and i + head_dim/2 are one, turned by the position times a frequency."""
    mixed, tables = mixed_and_tables()
    query, key, value = AS_WRITTEN.split_heads(mixed, GROUPS, HEAD_DIM, tables)
    by_group = mixed.view(SEQ, BATCH, GROUPS, HEADS_PER_GROUP + 2, HEAD_DIM)
    turns = torch.complex(tables[0], tables[1])

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        result = torch.complex(first, second) * turns
        return torch.cat([result.real, result.imag], -1)

    torch.testing.assert_close(query, turned(by_group[:, :, :, :-2].flatten(2, 3)))
    torch.testing.assert_close(key, turned(by_group[:, :, :, -2]))
    assert torch.equal(value, by_group[:, :, :, -1])
    plain = AS_WRITTEN.split_heads(mixed, GROUPS, HEAD_DIM, None)
    assert torch.equal(plain[0], by_group[:, :, :, :-2].flatten(2, 3))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compiled(never)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "split_heads"])
def test_compiled_kernels_compute_the_same(name: str, kernels: Kernels) -> None:
    mixed, tables = mixed_and_tables()
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (mixed, random(mixed.size(-1)), 1e-5),
        "swiglu": (mixed,),
        "split_heads": (mixed, GROUPS, HEAD_DIM, tables),
    }
    mixed.requires_grad_()
    results = []
    for source in (AS_WRITTEN, kernels):
        outputs = getattr(source, name)(*arguments[name])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [random(*output.shape) for output in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, mixed, weights)])
    for found, wanted in zip(*results, strict=True):
        # fp32, with sums in another order and other approximations of exp.
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["exponentials", "causal_exponentials", "causal_gradients", "row_dot"])
def test_compiled_kernels_without_gradients(name: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """They may overwrite what they are given, so each gets its own; twice, as blocks grow to the right."""
    for seen in (4, 8):
        shape = 2, 3, 4, seen
        for_rows = random(2, 3, 4, 1)
        arguments: dict[str, list[Tensor]] = {
            "exponentials": [random(5, seen).to(dtype), random(5)],
            "causal_exponentials": [random(*shape).to(dtype)],
            "causal_gradients": [random(*shape).to(dtype), random(*shape).to(dtype), for_rows, for_rows],
            "row_dot": [random(*shape).to(dtype), random(*shape).to(dtype)],
        }
        results = [
            getattr(source, name)(*(x.clone() for x in arguments[name])) for source in (AS_WRITTEN, kernels)
        ]
        # fp32 as above; in bf16 what lies close to the middle of two numbers may be rounded either way.
        relative = 2e-6 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(*results[::-1], rtol=relative, atol=2e-6)


def test_nothing_is_seen_in_the_future() -> None:
    exponentials, total, largest = AS_WRITTEN.causal_exponentials(random(1, 1, 3, 5).clone())
    assert (exponentials[0, 0] > 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert torch.equal(total[..., 0], exponentials.sum(-1))
    assert exponentials.amax() == 1.0, "exp(score - largest)"
    assert largest[0, 0, 2, 0] == random(1, 1, 3, 5)[0, 0, 2].amax()


@pytest.mark.parametrize(
    ("message", "reason"), [("no C++ compiler\nand much more", "no C++ compiler"), ("", "RuntimeError")]
)
def test_what_cannot_be_compiled_runs_as_written(
    message: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Any, **_: Any) -> Any:
        def fail(*arguments: Any) -> Any:
            raise RuntimeError(message)

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    told: list[str] = []
    swiglu = compiled(told.append).swiglu
    x = random(4, 6)
    for _ in range(2):
        assert torch.equal(swiglu(x), AS_WRITTEN.swiglu(x))
    assert told == [f"swiglu runs uncompiled: {reason}"]


def test_a_full_device_is_no_reason_to_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [torch.OutOfMemoryError("CUDA out of memory")]

    def full_at_first(function: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if left:
                raise left.pop()
            return function(*arguments) + 1  # tells the compiled function from the one as written

        return call

    monkeypatch.setattr(torch, "compile", full_at_first)
    swiglu = compiled(never).swiglu
    x = random(4, 6)
    with pytest.raises(torch.OutOfMemoryError):
        swiglu(x)
    assert torch.equal(swiglu(x), AS_WRITTEN.swiglu(x) + 1)


def test_only_steps_of_training_use_them() -> None:
    class Config:
        sequence_parallel = False
        params_dtype = torch.float32

    norm = RMSNorm(Config(), 8)
    use_kernels(nn.Sequential(norm), Kernels(rms_norm=lambda x, weight, epsilon: x * 0))
    x = random(3, 8)
    assert not norm.train()(x).any()
    assert norm.eval()(x).any()

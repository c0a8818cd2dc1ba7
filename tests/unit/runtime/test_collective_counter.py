"""The counter knows every way to send, and sees what other threads of a backward pass do."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.runtime.collective_counter import MESSAGES, NO_MESSAGE, message_bytes, operators

MAX_DEPTH_ON_ONE_THREAD = 60  # torch/csrc/autograd/engine.h: deeper ones go to other threads


def test_every_operator_that_sends_has_a_kind_and_a_message() -> None:
    """A new version of PyTorch may have more."""
    assert set(operators()) == MESSAGES.keys() | NO_MESSAGE
    for name, (_, message) in MESSAGES.items():
        schema = getattr(torch.ops.c10d, name).default._schema
        arguments = {argument.name for argument in schema.arguments}
        assert {"process_group"} | ({message} if message else set()) <= arguments, name


def test_the_size_of_nested_messages() -> None:
    assert message_bytes(torch.zeros(3, dtype=torch.bfloat16)) == 6
    assert message_bytes([[torch.zeros(2)], [torch.zeros(1, dtype=torch.float64)]]) == 16


class _Nested(torch.autograd.Function):
    """Identity whose backward pass runs another backward pass, `depth` times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, bottom: Any) -> Tensor:
        ctx.depth, ctx.bottom = depth, bottom
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.depth == 0:
            ctx.bottom()
        else:
            with torch.enable_grad():
                inner = torch.ones(1, requires_grad=True)
                _Nested.apply(inner, ctx.depth - 1, ctx.bottom).sum().backward()
        return gradient, None, None


def test_a_dispatch_mode_follows_backward_passes_to_other_threads() -> None:
    """As on GPUs, where each device has a thread of its own: the engine hands over the modes."""
    seen: list[int] = []
    bottom: list[int] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.tanh.default:
                seen.append(threading.get_ident())
            return func(*args, **(kwargs or {}))

    def compute() -> None:
        bottom.append(threading.get_ident())
        torch.tanh(torch.ones(1))

    x = torch.ones(1, requires_grad=True)
    with Mode():
        _Nested.apply(x, MAX_DEPTH_ON_ONE_THREAD + 10, compute).sum().backward()
    assert bottom != [threading.get_ident()], "the innermost pass was to run on another thread"
    assert seen == bottom

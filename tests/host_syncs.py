"""Counts how often a piece of code makes the host wait for the device, on a machine without one.

On a GPU these are the calls that wait: a number read from a tensor, a tensor copied to the host, and a
synchronization asked for by name. The same calls are made on a CPU, where they cost nothing: count them.
What it cannot see: copies from the host to the device, which wait too (tests/gpu/test_gpu_syncs.py does).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.engine.deepspeed_quirks import NormJudge

WAITING_OPERATORS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal")
WAITING_METHODS = ("tolist", "cpu", "numpy")


class HostTensor(torch.Tensor):
    """Stands for a tensor that lies in host memory also where there is a GPU, as does what follows from it:
    to read it does not wait. Only the norm that DeepSpeed is given is such a one."""


def is_host(value: object) -> bool:
    return isinstance(value, HostTensor)


class _Operators(TorchDispatchMode):
    """item(), float(), bool() and masks as indices arrive here, also from the autograd's hooks."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = str(function).startswith(WAITING_OPERATORS) or is_selection(str(function), args)
        if waits and not is_host(args[0]):
            self._places.append(place())
        return function(*args, **(kwargs or {}))


def is_selection(function: str, args: Any) -> bool:
    """Whether a mask selects elements, whose number the host must know. PyTorch makes `x[mask] = number` a
    `masked_fill_`, which need not (`canDispatchToMaskedFill` in ATen's IndexingUtils.h)."""
    if not function.startswith(("aten.index.", "aten.index_put", "aten._index_put")):
        return False
    has_mask = any(index is not None and index.dtype == torch.bool for index in args[1])
    return has_mask and not (len(args) > 2 and args[2].numel() == 1)


def place() -> str:
    """The innermost line of DeepSpeed, Megatron Core or ours."""
    frames = [f for f in traceback.extract_stack() if "host_syncs" not in f.filename]
    ours = [
        f for f in frames if any(part in f.filename for part in ("/deepspeed/", "/megatron/", "/distllm/"))
    ]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno} {frame.name}"


@contextmanager
def counted() -> Iterator[list[str]]:
    """Where the code inside would have waited, one entry for each time."""
    places: list[str] = []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            if not (args and is_host(args[0])):
                places.append(place())
            return original(*args, **kwargs)

        return method

    judged = NormJudge._judged

    def judged_on_host(judge: NormJudge, norm: torch.Tensor) -> torch.Tensor:
        return judged(judge, norm).as_subclass(HostTensor)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(NormJudge, "_judged", judged_on_host))
        for name in WAITING_METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting(getattr(torch.Tensor, name))))
        for owner in (get_accelerator(), torch.cuda):
            stack.enter_context(mock.patch.object(owner, "synchronize", counting(owner.synchronize)))
        stack.enter_context(_Operators(places))
        yield places

"""On a GPU, backward passes run on a thread of the engine: the counter must see what is sent there."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.gpu


def test_a_dispatch_mode_sees_the_backward_pass_of_a_device() -> None:
    threads: dict[str, set[int]] = {"mm": set()}

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                threads["mm"].add(threading.get_ident())
            return func(*args, **(kwargs or {}))

    weight = torch.ones(4, 4, device="cuda", requires_grad=True)
    with Mode():
        (torch.ones(4, 4, device="cuda") @ weight).sum().backward()
    assert len(threads["mm"]) == 2, "forward on this thread, backward on the device's"

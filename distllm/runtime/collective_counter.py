"""Counts what a process really sends: every collective of every library, below all of their interfaces.

All functions of torch.distributed end in operators of the dispatcher's namespace `c10d`, on gloo and NCCL
alike, whoever calls them and under whichever name it has imported them. A dispatch mode sees them there, as
`torch.distributed.tensor.debug.CommDebugMode` does. Backward passes on a GPU run on threads of the autograd
engine, to which the engine hands the modes of the thread that called `backward` (`at::ThreadLocalState`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distllm.layout.groups import Groups
from distllm.layout.traffic import Amount, Traffic, Transfer, add_up

# Operator: (kind, the argument that is the message).
MESSAGES = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "allgather_": ("all_gather", "output_tensors"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_coalesced_": ("all_gather", "output_lists"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "alltoall_base_": ("all_to_all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "gather_": ("gather", "output_tensors"),
    "scatter_": ("scatter", "input_tensors"),
    "send": ("send", "tensors"),
    "recv_": ("recv", "tensors"),
    "recv_any_source_": ("recv", "tensors"),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None),
}
NO_MESSAGE = {"check_for_nan"}


class CollectiveCounter(TorchDispatchMode):
    """`with CollectiveCounter(groups) as counter:` counts what this rank sends; `counter.traffic()`.

    Groups of one rank are left out: nothing is sent. A group that is none of `groups` counts as "world" where
    it is the world group, and else by its own name. Object collectives count as the collectives of tensors
    that they are made of. It costs some microseconds per operation of any kind: do not time what it counts.
    """

    def __init__(self, groups: Groups | None) -> None:
        """groups: None before they exist; then all but the world group count under PyTorch's names."""
        super().__init__()
        self._names = group_names(groups) if groups else {}
        self._counted: list[tuple[Transfer, Amount]] = []

    def traffic(self) -> Traffic:
        return add_up(self._counted)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = func._schema.name.removeprefix("c10d::")
        if name in NO_MESSAGE:
            return
        assert name in MESSAGES, f"no size is known for the collective {name}"
        kind, message = MESSAGES[name]
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
        group = dist.ProcessGroup.unbox(given["process_group"])
        if group.size() == 1:
            return
        size = message_bytes(given[message]) if message else 0
        transfer = Transfer(self._names.get(group.group_name, group.group_name), kind)
        self._counted.append((transfer, Amount(1, size)))


def group_names(groups: Groups) -> dict[str, str]:
    """The name by which PyTorch knows a group -> ours."""
    ours = {"world": dist.group.WORLD, **groups.by_name}
    return {group.group_name: name for name, group in ours.items() if group is not None}


def message_bytes(tensors: Any) -> int:
    """Of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(message_bytes, tensors))


def operators() -> list[str]:
    """Names of all operators through which a process can send, in this version of PyTorch."""
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return [name.removeprefix("c10d::") for name in names if name.startswith("c10d::")]

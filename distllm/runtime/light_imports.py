"""Import PyTorch 2.13, Megatron Core 0.16.1 and DeepSpeed 0.19.8 without what most jobs never call.

A rank of a training job on CPUs, with AdamW, imports 1,811 modules, not 3,465: see lazy_compile.py
(the compiler) and lazy_names.py (DTensors and others). What is left out is imported when it is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from distllm.runtime.lazy_compile import break_traced_graphs, compile_later, disable_when_traced
from distllm.runtime.lazy_names import defer

# What is done around the import of each module.
AROUND: dict[str, Sequence[Callable[[ModuleType], AbstractContextManager[None]]]] = {
    "torch._compile": [disable_when_traced("_disable_dynamo")],
    "torch.compiler": [disable_when_traced("disable")],
    "torch.optim.optimizer": [break_traced_graphs],
    "torch.distributed.checkpoint": [defer],
    "megatron.core": [compile_later, defer],
    "deepspeed.runtime.zero.muon.original_muon": [compile_later],
}


def install() -> None:
    """Make the imports of these modules light; call before torch is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds modules where Python does, and changes what happens around their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AROUND:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module inside the contexts that are listed for it."""

    def __init__(self, original: Loader) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)  # what else is asked of a loader, such as its path

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with ExitStack() as stack:
            for around in AROUND[module.__name__]:
                stack.enter_context(around(module))
            self._original.exec_module(module)

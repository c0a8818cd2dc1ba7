"""Import Megatron Core 0.16.1 and DeepSpeed 0.19.8 without PyTorch's compiler.

Both decorate functions with torch.compile where they are imported (megatron/core/jit.py, zero/muon/
original_muon.py), which imports Dynamo, Inductor and NetworkX, 800 modules, on every rank, for functions that
most jobs never call. Each is compiled at its first call instead: an import of both takes 5.5 s of a
processor, not 9.1 s (AMD EPYC).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULES = ("megatron.core", "deepspeed.runtime.zero.muon.original_muon")


def install() -> None:
    """Make the imports of `MODULES` put compilations off; call before they are imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds modules where Python does, and changes what happens around their import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module while torch.compile puts its work off."""

    def __init__(self, original: Loader) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)  # what else is asked of a loader, such as its path

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        now = torch.compile
        torch.compile = functools.partial(_later, now)
        try:
            self._original.exec_module(module)
        finally:
            torch.compile = now


def _later(
    now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """Return what torch.compile(function, **options) does, which is called when it is first needed."""
    if function is None:  # a decorator with options
        return functools.partial(_later, now, **options)
    compiled = functools.cache(lambda: now(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call

"""Import names where they are used, not on every rank of every job.

torch.distributed.checkpoint (PyTorch 2.13) and Megatron Core 0.16.1 import DTensor and FSDP, mostly to ask
whether a tensor is a DTensor, and the agent of torchrun, TensorBoard and the builder of C++ extensions; with
them come SymPy, protobuf and setuptools. A name that these two import stands for what it names, which is
imported when it is called or asked for an attribute. Nothing is an instance of a class that was not
imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DEFERRED = (
    "torch.distributed.tensor",
    "torch.distributed._tensor",
    "torch.distributed.fsdp",
    "torch.distributed.elastic.agent",
    "torch.utils.tensorboard",
    "torch.utils.cpp_extension",
)
OLD_NAMES = {"torch.distributed._tensor": "torch.distributed.tensor"}  # which re-exports the other


@contextmanager
def defer(module: ModuleType) -> Iterator[None]:
    """Let what `module` imports of `DEFERRED` while it is imported stand for what it names."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):  # it is imported by another such module
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, found in sys.modules.items() if isinstance(found, _Module)]:
            del sys.modules[name]  # whoever imports it from now on gets it


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_deferred = any(fullname == name or fullname.startswith(f"{name}.") for name in DEFERRED)
        return ModuleSpec(fullname, self, is_package=True) if is_deferred else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Module(ModuleType):
    """Gives a stand-in for each name that is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module = OLD_NAMES.get(self.__name__, self.__name__)
        return StandIn(name, (), {"origin": module})


class StandIn(type):
    """Stands for `origin`.`__name__`: a class, since it may be asked for instances."""

    origin: str

    def imported(cls) -> Any:
        """Import and return what it stands for."""
        return getattr(importlib.import_module(cls.origin), cls.__name__)

    def __instancecheck__(cls, instance: object) -> bool:
        real = getattr(sys.modules.get(cls.origin), cls.__name__, None)
        return real is not None and isinstance(instance, real)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.imported()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls.imported(), name)

"""Import PyTorch's compiler where something is compiled, not on every rank of every job.

- Megatron Core 0.16.1 and DeepSpeed 0.19.8 decorate functions with torch.compile where they are imported
  (megatron/core/jit.py, zero/muon/original_muon.py), which imports Dynamo and Inductor. Each function is
  compiled at its first call instead.
- PyTorch 2.13 imports Dynamo to keep functions out of it: its optimizers (torch/_compile.py, torch/optim/
  optimizer.py) and DeepSpeed's hooks of ZeRO-3 (torch/compiler). As long as nobody has imported it nothing is
  traced, and there is nothing to keep out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def compile_later(module: ModuleType) -> Iterator[None]:
    """Put compilations off that `module` asks for while it is imported."""
    import torch

    now = torch.compile
    torch.compile = functools.partial(_later, now)
    try:
        yield
    finally:
        torch.compile = now


def disable_when_traced(name: str) -> Callable[[ModuleType], AbstractContextManager[None]]:
    """Make decorator `name` of a module, which keeps functions out of Dynamo, import it only for what may be
    traced."""

    @contextmanager
    def around(module: ModuleType) -> Iterator[None]:
        yield
        setattr(module, name, functools.partial(_disable, getattr(module, name)))

    return around


@contextmanager
def break_traced_graphs(module: ModuleType) -> Iterator[None]:
    """Make the decorator of the steps of torch.optim import Dynamo only for what may be traced."""
    yield
    decorate = module._use_grad_for_differentiable
    module._use_grad_for_differentiable = functools.partial(_break, decorate)  # type: ignore[attr-defined]


def _disable(
    disable: Callable[..., Any], function: Callable[..., Any] | None = None, *options: Any, **more: Any
) -> Callable[..., Any]:
    """Return what PyTorch's disable(function) does; untraced, it is `function`."""
    if function is None or isinstance(function, type):  # a decorator with options, or of a class: as it was
        return disable(function, *options, **more)
    disabled = functools.cache(lambda: disable(function, *options, **more))
    return _choose(lambda *args, **kwargs: disabled()(*args, **kwargs), function)


def _break(decorate: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch.optim.optimizer._use_grad_for_differentiable(step) does, without breaking a graph."""

    @functools.wraps(step)
    def untraced(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return step(optimizer, *args, **kwargs)

    return _choose(decorate(step), untraced)


def _choose(traced: Callable[..., Any], untraced: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `traced` if Dynamo was imported, else `untraced`."""

    @functools.wraps(untraced)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (traced if "torch._dynamo" in sys.modules else untraced)(*args, **kwargs)

    return call


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

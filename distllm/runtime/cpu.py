"""Run Megatron Core 0.16.1 without a GPU: its device calls are replaced, nothing else is changed.

Installed only where no GPU is in use. Each replacement names the call that needs it; without them the same
modules and schedules that run on NCCL could not run on gloo.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


def install() -> None:
    """Replace Megatron Core's device calls for the CPU; calling it again changes nothing."""
    assert not torch.cuda.is_available(), "the CPU adapter would hide a GPU that is in use"
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    # tensor_parallel/mappings.py and pipeline_parallel/p2p_communication.py allocate on the current device.
    cuda.current_device = lambda: cpu
    # p2p_communication.py synchronizes after batched sends.
    cuda.synchronize = lambda *args, **kwargs: None
    # language_module.py moves a tied embedding to the device before it copies it from stage to stage.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # tensor_parallel/random.py keeps one generator per device; here the device is the CPU.
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Each schedule counts tokens in torch.zeros(..., device="cuda"); a stand-in for the module name `torch`
    # there costs nothing elsewhere, where a TorchFunctionMode would slow every operation of the program.
    schedules.torch = _TorchOnCpu()


class _TorchOnCpu(ModuleType):
    """The module torch, except that zeros(device="cuda") allocates on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)

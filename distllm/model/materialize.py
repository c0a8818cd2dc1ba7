"""Give memory to a model that was built without, one parameter after the other."""

from __future__ import annotations

import torch
from torch import nn


def materialize(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Replace parameter `name` of `model`, on the meta device, by one on `device` with arbitrary content.

    Attributes that Megatron Core has set on it are kept. Its dtype is not: Megatron Core (0.16.1) builds
    learned positions in fp32 whatever `params_dtype` says, and leaves them to a wrapper that converts all.
    """
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    described = module.get_parameter(attribute)
    parameter = nn.Parameter(torch.empty(described.shape, dtype=dtype, device=device))
    parameter.__dict__.update(described.__dict__)
    setattr(module, attribute, parameter)
    return parameter

"""Canonical names: what each parameter of this rank is called, and where it lies, in the whole model."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import nn

from distllm.layout.groups import Groups
from distllm.layout.place import Place


def parameter_places(model: GPTModel, groups: Groups) -> dict[nn.Parameter, Place]:
    """The place of every parameter of `model`, in the order of `named_parameters()`.

    Names are Megatron's with the global layer number. The only tensor that exists under two names is a tied
    output projection on a last stage that is not the first: there it has the embedding's name and the first
    stage is its primary.
    """
    _mark_cut_parameters(model)
    return {p: _place(model, name, p, groups) for name, p in model.named_parameters()}


def _mark_cut_parameters(model: GPTModel) -> None:
    """Say of each parameter along which dim tensor parallelism cuts it, if it does.

    Megatron Core 0.16.1 says so only while it initialises weights, which it does not do for us. DeepSpeed
    reads the mark too: its gradient norm counts unmarked parameters once per tensor-parallel group.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            for parameter in module.parameters(recurse=False):  # weight and bias
                _mark(parameter, dim=0)
        elif isinstance(module, RowParallelLinear):
            _mark(module.weight, dim=1)


def _mark(parameter: Any, dim: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


def _place(model: GPTModel, name: str, parameter: Any, groups: Groups) -> Place:
    name = _global_layer_name(model, name)
    primary = True
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        name, primary = "embedding.word_embeddings.weight", False
    shape = list(parameter.shape)
    gated = "linear_fc1" in name and model.config.gated_linear_unit
    if gated:  # gate and up projection are stacked: [2 * ffn/tp, ...] -> [2, ffn/tp, ...]
        shape = [2, shape[0] // 2, *shape[1:]]
    global_shape, offsets = list(shape), [0] * len(shape)
    if getattr(parameter, "tensor_model_parallel", False):
        dim = parameter.partition_dim + (1 if gated else 0)
        global_shape[dim] *= groups.grid.tensor
        offsets[dim] = groups.coordinates.tensor * shape[dim]
    elif groups.coordinates.tensor != 0:
        primary = False
    return Place(name, tuple(global_shape), tuple(shape), tuple(offsets), primary)


def _global_layer_name(model: GPTModel, name: str) -> str:
    """decoder.layers.<index on this stage>... -> decoder.layers.<index in the whole model>..."""
    prefix, found, rest = name.partition(".layers.")
    if not found:
        return name
    local_index, rest = rest.split(".", 1)
    layer_number: int = model.decoder.layers[int(local_index)].layer_number  # counts from 1
    return f"{prefix}.layers.{layer_number - 1}.{rest}"

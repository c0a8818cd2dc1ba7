"""Match this rank's parameters with the entries of the table, and locate their parts in the whole."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel

from distllm.layout.groups import Groups
from distllm.layout.parameter import WORD_EMBEDDINGS, Parameter
from distllm.layout.place import Place
from distllm.model.parameters import Table


def match_table(model: GPTModel, table: Table, groups: Groups) -> dict[str, Parameter]:
    """Return the entry of every parameter of `model` by the model's own name, in its order.

    Canonical names are Megatron's with the global layer number. The only tensor that exists under two names
    is a tied output projection on a last stage that is not the first: there it is the embedding's.
    """
    matched: dict[str, Parameter] = {}
    for own_name, tensor in model.named_parameters():
        name = _global_layer_name(model, own_name)
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = WORD_EMBEDDINGS
        assert name in table, f"{name} is not in the family's table of parameters"
        entry = table[name]
        expected = entry.module_shape(groups.grid.degrees)
        assert tuple(tensor.shape) == expected, f"{name} is {tuple(tensor.shape)}, its table says {expected}"
        _mark_cut(tensor, entry)
        matched[own_name] = entry
    return matched


def place_of(entry: Parameter, groups: Groups, is_tied_copy: bool) -> Place:
    """Return the place of this rank's part.

    Of replicas over the tensor-parallel ranks the first counts, and of a tied embedding that on the first
    stage.
    """
    local_shape, offsets = entry.local_shape(groups.grid.degrees), [0] * len(entry.shape)
    if entry.cut_dim is not None:
        offsets[entry.cut_dim] = groups.coordinates.of(entry.cut_axis) * local_shape[entry.cut_dim]
    is_first_replica = entry.cut_dim is not None or groups.coordinates.tensor == 0
    return Place(
        entry.name,
        entry.shape,
        local_shape,
        tuple(offsets),
        primary=is_first_replica and not is_tied_copy,
        is_decayed=entry.is_decayed,
    )


def _mark_cut(tensor: Any, entry: Parameter) -> None:
    """Mark on a parameter the dim along which tensor parallelism cuts it.

    Megatron Core 0.16.1 sets the mark only while it initialises weights, which it does not do for us.
    DeepSpeed reads the mark too: its gradient norm counts unmarked parameters once per tensor-parallel group.
    """
    if entry.cut_dim is not None and entry.cut_axis == "tensor":
        tensor.tensor_model_parallel, tensor.partition_dim = True, entry.module_cut_dim
        tensor.partition_stride = 1


def _global_layer_name(model: GPTModel, name: str) -> str:
    """Turn decoder.layers.<index on this stage>... into decoder.layers.<index in the whole model>..."""
    prefix, found, rest = name.partition(".layers.")
    if not found:
        return name
    local_index, rest = rest.split(".", 1)
    layer_number: int = model.decoder.layers[int(local_index)].layer_number  # counts from 1
    return f"{prefix}.layers.{layer_number - 1}.{rest}"

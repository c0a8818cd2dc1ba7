"""The parameters that a rank holds before ZeRO partitions anything: name and shape of each. Pure.

Megatron's tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053) cuts the projections out of the residual
stream by columns, those back into it by rows, and both vocabulary tables by rows. Norms, learned positions
and the biases of projections back into the residual stream are held whole by every tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from distllm.config.schema import Model
from distllm.config.stages import Stage

Shapes = Mapping[str, tuple[int, ...]]


def stage_parameters(model: Model, stage: Stage, vocab_size: int, tensor: int) -> Shapes:
    """Canonical name -> shape on one of the `tensor` ranks of `stage`; they all hold as much.

    A tied output projection on a last stage that is not the first is a copy, under the embedding's name.
    """
    table = (model.padded_vocab_size(vocab_size) // tensor, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {}
    if stage.is_first:
        shapes["embedding.word_embeddings.weight"] = table
        if model.position_embedding == "learned":
            shapes["embedding.position_embeddings.weight"] = (model.seq_length, model.hidden_size)
    layer_shapes = layer_parameters(model, tensor)
    for layer in stage.layers:
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    if stage.is_last:
        shapes |= _norm("decoder.final_layernorm", model)
        shapes["embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"] = table
    return shapes


def layer_parameters(model: Model, tensor: int) -> Shapes:
    """Name within the layer -> shape on one of `tensor` ranks, in the model's order, by which ZeRO cuts."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    context = model.num_attention_heads * model.resolved_head_dim
    qkv = context + 2 * model.num_query_groups * model.resolved_head_dim
    ffn_in = 2 * ffn if model.activation == "swiglu" else ffn
    return {
        **_norm("input_layernorm", model),
        **_linear("self_attention.linear_proj", (hidden, context // tensor), model),
        **_linear("self_attention.linear_qkv", (qkv // tensor, hidden), model),
        **_norm("pre_mlp_layernorm", model),
        **_linear("mlp.linear_fc1", (ffn_in // tensor, hidden), model),
        **_linear("mlp.linear_fc2", (hidden, ffn // tensor), model),
    }


def numel(shapes: Shapes) -> int:
    """Elements of all these parameters."""
    return sum(map(math.prod, shapes.values()))


def _norm(name: str, model: Model) -> dict[str, tuple[int, ...]]:
    weights = ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
    return {f"{name}.{weight}": (model.hidden_size,) for weight in weights}


def _linear(name: str, shape: tuple[int, int], model: Model) -> dict[str, tuple[int, ...]]:
    """A bias is as long as the rows that it is added to."""
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": shape}
    return weight | ({f"{name}.bias": shape[:1]} if model.bias else {})

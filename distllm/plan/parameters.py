"""The parameters that a rank holds before ZeRO partitions anything: name and shape of each. Pure.

Megatron's tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053) cuts the projections out of the residual
stream by columns, those back into it by rows, and both vocabulary tables by rows. Norms, learned positions
and the biases of projections back into the residual stream are held whole by every tensor-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from distllm.config.schema import Model
from distllm.plan.stages import Stage

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
    """Name within the layer -> shape on one of `tensor` ranks."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    context = model.num_attention_heads * model.resolved_head_dim
    qkv = context + 2 * model.num_query_groups * model.resolved_head_dim
    ffn_in = 2 * ffn if model.activation == "swiglu" else ffn
    shapes = {
        **_norm("input_layernorm", model),
        "self_attention.linear_qkv.weight": (qkv // tensor, hidden),
        "self_attention.linear_proj.weight": (hidden, context // tensor),
        **_norm("pre_mlp_layernorm", model),
        "mlp.linear_fc1.weight": (ffn_in // tensor, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn // tensor),
    }
    if model.bias:
        shapes |= {
            "self_attention.linear_qkv.bias": (qkv // tensor,),
            "self_attention.linear_proj.bias": (hidden,),
            "mlp.linear_fc1.bias": (ffn_in // tensor,),
            "mlp.linear_fc2.bias": (hidden,),
        }
    return shapes


def numel(shapes: Shapes) -> int:
    """Elements of all these parameters."""
    return sum(map(math.prod, shapes.values()))


def _norm(name: str, model: Model) -> dict[str, tuple[int, ...]]:
    weights = ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
    return {f"{name}.{weight}": (model.hidden_size,) for weight in weights}

"""The decoder that most families share: pre-norm, self-attention with grouped queries, a feed-forward net.

A family derives from it and overrides what it does otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from distllm.config.problems import Problem
from distllm.config.schema import Model
from distllm.layout.parameter import WORD_EMBEDDINGS, Kind, Parameter, Rows
from distllm.layout.place import Shape
from distllm.model.families.family import Family

MEGATRON_NORM_NAMES = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


def attention_heads(model: Model) -> Iterator[Problem]:
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        unit = model.num_attention_heads * (2 if model.position_embedding == "rope" else 1)
        nearest = max(model.hidden_size // unit, 1) * unit
        rule = f"must be a multiple of model.num_attention_heads={model.num_attention_heads}"
        fix = f"model.hidden_size={nearest}, or give model.head_dim"
        yield Problem("model.hidden_size", model.hidden_size, rule, fix)


def query_groups(model: Model) -> Iterator[Problem]:
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        nearest = max(divisor for divisor in range(1, min(heads, groups) + 1) if heads % divisor == 0)
        rule = f"must divide model.num_attention_heads={heads}"
        yield Problem("model.num_query_groups", groups, rule, f"model.num_query_groups={nearest}")


def rotary_width(model: Model) -> Iterator[Problem]:
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        return  # attention_heads speaks of that
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    if model.position_embedding == "rope" and head_dim % 2:
        rule = "must be even: rotary positions turn pairs of dimensions"
        fix = f"model.head_dim={head_dim + 1}, or model.position_embedding=learned"
        yield Problem("model.head_dim", head_dim, rule, fix)


class Decoder(Family):
    """Megatron's tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053) cuts the projections out of the
    residual stream by columns, those back into it by rows, and both vocabulary tables by rows."""

    layer_order: tuple[str, ...] = (
        "input_layernorm",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    rules: tuple[Callable[[Model], Iterator[Problem]], ...] = (attention_heads, query_groups, rotary_width)

    def embedding(self, model: Model, num_rows: int) -> list[Parameter]:
        tables = [_vocabulary_table(WORD_EMBEDDINGS, model, num_rows)]
        if model.position_embedding == "learned":
            shape = (model.seq_length, model.hidden_size)
            name = "embedding.position_embeddings.weight"
            tables.append(Parameter(name, shape, "table", model.init_std))
        return tables

    def layer(self, model: Model, number: int) -> list[Parameter]:
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        width = model.resolved_head_dim
        context = model.num_attention_heads * width
        qkv = context + 2 * model.num_query_groups * width
        fc1 = (2, ffn, hidden) if model.activation == "swiglu" else (ffn, hidden)
        prefix = f"decoder.layers.{number}"
        # Back into the residual stream, damped by the number of residual additions, as in GPT-2.
        damped = model.init_std / math.sqrt(2 * model.num_layers)
        return [
            *norm(f"{prefix}.input_layernorm", model),
            *linear(f"{prefix}.self_attention.linear_proj", (hidden, context), model, damped, cut_dim=1),
            *linear(
                f"{prefix}.self_attention.linear_qkv", (qkv, hidden), model, cut_dim=0, rows="query key value"
            ),
            *norm(f"{prefix}.pre_mlp_layernorm", model),
            *linear(f"{prefix}.mlp.linear_fc1", fc1, model, cut_dim=len(fc1) - 2),
            *linear(f"{prefix}.mlp.linear_fc2", (hidden, ffn), model, damped, cut_dim=1),
        ]

    def head(self, model: Model, num_rows: int) -> list[Parameter]:
        tied = model.tie_embeddings
        output = [] if tied else [_vocabulary_table("output_layer.weight", model, num_rows)]
        return [*norm("decoder.final_layernorm", model), *output]

    def activations(self, model: Model, tensor: int = 1, sequence: bool = False) -> int:
        """Korthikanti et al. 2022 (arXiv:2205.05198), without the score matrix, which the attention kernel
        recomputes, and without dropout masks.

        What lies between the column- and the row-parallel projections is cut by tensor parallelism, what lies
        outside by sequence parallelism only. Recomputing the attention core (`selective`) changes nothing:
        its inputs and its output are kept by its neighbours anyway, and the kernel's own part is 1 fp32 per
        head. Nor does attention inside documents, which makes no mask; but on a CPU, which runs them one by
        one, the context is kept twice.
        """
        hidden, ffn = model.hidden_size, model.ffn_hidden_size
        queries = model.num_attention_heads * model.resolved_head_dim
        keys = model.num_query_groups * model.resolved_head_dim
        # Input and output of both; kernels that are not fused (RMSNorm's on CPUs) keep one more each.
        norms = 4 * hidden
        # The projection, whole, since the values are a view of it; the context; rotated queries and keys.
        rotated = queries + keys if model.position_embedding == "rope" else 0
        attention = (queries + 2 * keys) + queries + rotated
        # Both projections, activated gate, product; or, without a gate, before and after the activation.
        feed_forward = 4 * ffn if model.activation == "swiglu" else 2 * ffn
        return norms // (tensor if sequence else 1) + (attention + feed_forward) // tensor

    def flops_per_token(self, model: Model, vocab_size: int) -> float:
        """6 per parameter that multiplies (embedding look-ups do not, a tied output projection does) and
        12 * layers * heads * head_dim * seq for the attention scores, not halved for the causal mask, nor
        less where attention stays inside documents: the convention of PaLM (arXiv:2204.02311, appendix B), in
        which most figures are published."""
        layers = sum(p.numel for n in range(model.num_layers) for p in self.layer(model, n))
        final_norm = sum(p.numel for p in self.head(model, vocab_size) if p.kind == "vector")
        multiplying = layers + final_norm + vocab_size * model.hidden_size
        attention_width = model.num_attention_heads * model.resolved_head_dim
        return 6.0 * multiplying + 12.0 * model.num_layers * attention_width * model.seq_length

    def transformer_arguments(self, model: Model) -> dict[str, Any]:
        from distllm.model.decoder_layer import ACTIVATIONS

        return {
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            "kv_channels": model.resolved_head_dim,
            "normalization": MEGATRON_NORM_NAMES[model.normalization],
            "layernorm_epsilon": model.norm_epsilon,
            "activation_func": ACTIVATIONS[model.activation],
            "gated_linear_unit": model.activation == "swiglu",
            "add_bias_linear": model.bias,
        }

    def gpt_arguments(self, model: Model) -> dict[str, Any]:
        return {
            "max_sequence_length": model.seq_length,
            "position_embedding_type": "rope" if model.position_embedding == "rope" else "learned_absolute",
            "rotary_base": model.rope_base,
            "share_embeddings_and_output_weights": model.tie_embeddings,
        }

    def layer_spec(self, model: Model, number: int) -> Any:
        from distllm.model.decoder_layer import layer_spec

        return layer_spec(model)

    def final_norm(self, model: Model) -> Any:
        from distllm.model.decoder_layer import NORMS

        return NORMS[model.normalization]


def norm(name: str, model: Model) -> list[Parameter]:
    """Weight, and bias where the kind of norm has one; on every tensor-parallel rank."""
    shape = (model.hidden_size,)
    weight = Parameter(f"{name}.weight", shape, "vector", 1.0, is_constant=True)
    bias = Parameter(f"{name}.bias", shape, "vector", 0.0, is_constant=True)
    return [weight, bias] if model.normalization == "layernorm" else [weight]


def linear(
    name: str, shape: Shape, model: Model, std: float | None = None, *, cut_dim: int, rows: Rows = ""
) -> list[Parameter]:
    """A projection, and its bias where the model has biases. shape: [(stacked,) out, in].

    A bias is as long as the rows that it is added to: cut with them, or whole where columns are cut.
    """
    is_stacked = len(shape) == 3
    kind: Kind = "matrix"
    initial = model.init_std if std is None else std
    weight = Parameter(
        f"{name}.weight", shape, kind, initial, cut_dim=cut_dim, is_stacked=is_stacked, rows=rows
    )
    if not model.bias:
        return [weight]
    cuts_rows = cut_dim == len(shape) - 2
    bias = Parameter(
        f"{name}.bias",
        shape[:-1],
        "vector",
        0.0,
        is_constant=True,
        cut_dim=cut_dim if cuts_rows else None,
        is_stacked=is_stacked,
        rows=rows,
    )
    return [weight, bias]


def _vocabulary_table(name: str, model: Model, num_rows: int) -> Parameter:
    shape = (num_rows, model.hidden_size)
    return Parameter(name, shape, "table", model.init_std, cut_dim=0, rows="vocabulary")

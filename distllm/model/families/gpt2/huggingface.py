"""GPT-2 in transformers: `GPT2LMHeadModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distllm.config.problems import Problem
from distllm.config.schema import Model
from distllm.layout.parameter import Parameter
from distllm.model.families.huggingface import HuggingFaceForm

UNUSED_ROPE_BASE = 10000.0  # the setting must have a value


class GPT2Form(HuggingFaceForm):
    name = "GPT-2"
    model_type = "gpt2"
    classes = ("GPT2LMHeadModel", "GPT2Model")
    exported_shapes = (
        "GPT-2 (layernorm, learned, gelu or gelu_tanh, bias, as many query groups as heads, head_dim=null)"
    )
    keys = {  # noqa: RUF012  # constants
        "num_layers": ("n_layer", None),
        "hidden_size": ("n_embd", None),
        "ffn_hidden_size": ("n_inner", None),
        "num_attention_heads": ("n_head", None),
        "seq_length": ("n_positions", 1024),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "init_std": ("initializer_range", 0.02),
    }
    only = {  # noqa: RUF012
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    }
    modules = {  # noqa: RUF012
        "embedding.word_embeddings": ("transformer.wte",),
        "embedding.position_embeddings": ("transformer.wpe",),
        "decoder.final_layernorm": ("transformer.ln_f",),
        "output_layer": ("lm_head",),
    }
    layer_modules = {  # noqa: RUF012
        "input_layernorm": ("ln_1",),
        "self_attention.linear_qkv": ("attn.c_attn",),
        "self_attention.linear_proj": ("attn.c_proj",),
        "pre_mlp_layernorm": ("ln_2",),
        "mlp.linear_fc1": ("mlp.c_fc",),
        "mlp.linear_fc2": ("mlp.c_proj",),
    }
    layer_prefix = "transformer.h.{}."
    prefix = "transformer."

    def problems(self, model: Model) -> Iterator[Problem]:
        yield from self.unlike(model, normalization=["layernorm"], position_embedding=["learned"])
        yield from self.unlike(model, activation=["gelu_tanh", "gelu"], bias=[True])
        yield from self.unlike(model, num_query_groups=[model.num_attention_heads])
        if model.resolved_head_dim * model.num_attention_heads != model.hidden_size:
            rule = "must be hidden_size / num_attention_heads in GPT-2, the nearest shape"
            yield Problem("model.head_dim", model.head_dim, rule, fix="")

    def extra_config(self, model: Model) -> dict[str, Any]:
        activation = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[model.activation]
        dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        return {"activation_function": activation, **dropouts}

    def settings(
        self, raw: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Problem]]:
        settings: dict[str, Any] = {
            "normalization": "layernorm",
            "position_embedding": "learned",
            "activation": "gelu" if raw.get("activation_function") == "gelu" else "gelu_tanh",
            "bias": True,
            "rope_base": UNUSED_ROPE_BASE,
            "num_query_groups": values["num_attention_heads"],
            "head_dim": None,
        }
        if values["ffn_hidden_size"] is None and isinstance(values["hidden_size"], int):
            settings["ffn_hidden_size"] = 4 * values["hidden_size"]
        return settings, []

    def is_transposed(self, parameter: Parameter) -> bool:
        """Return True for GPT-2's projections, which transformers keeps as [in, out]."""
        return parameter.kind == "matrix"

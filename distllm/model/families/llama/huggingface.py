"""Llama in transformers: `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distllm.config.problems import Problem
from distllm.config.schema import Model
from distllm.model.families.huggingface import HuggingFaceForm, config_problem

DEFAULT_ROPE_BASE = 10000.0


class LlamaForm(HuggingFaceForm):
    """Llama's form. Rotary positions pair the same dims in both, so rows within a head keep their order."""

    name = "Llama"
    model_type = "llama"
    classes = ("LlamaForCausalLM", "LlamaModel")
    exported_shapes = "Llama (rmsnorm, rope, swiglu, hidden_size a multiple of the heads)"
    keys = {  # noqa: RUF012  # constants
        "num_layers": ("num_hidden_layers", None),
        "hidden_size": ("hidden_size", None),
        "ffn_hidden_size": ("intermediate_size", None),
        "num_attention_heads": ("num_attention_heads", None),
        "num_query_groups": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "seq_length": ("max_position_embeddings", 2048),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "bias": ("attention_bias", False),
        "tie_embeddings": ("tie_word_embeddings", False),
        "init_std": ("initializer_range", 0.02),
    }
    only = {  # noqa: RUF012
        "hidden_act": ("silu", "swish"),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1),
        "quantization_config": (None,),
    }
    modules = {  # noqa: RUF012
        "embedding.word_embeddings": ("model.embed_tokens",),
        "decoder.final_layernorm": ("model.norm",),
        "output_layer": ("lm_head",),
    }
    layer_modules = {  # noqa: RUF012
        "input_layernorm": ("input_layernorm",),
        "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj": ("self_attn.o_proj",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2": ("mlp.down_proj",),
    }
    layer_prefix = "model.layers.{}."
    prefix = "model."

    def problems(self, model: Model) -> Iterator[Problem]:
        yield from self.unlike(model, normalization=["rmsnorm"], position_embedding=["rope"])
        yield from self.unlike(model, activation=["swiglu"])
        if model.hidden_size % model.num_attention_heads:
            rule = f"transformers asks for a multiple of num_attention_heads={model.num_attention_heads}"
            yield Problem("model.hidden_size", model.hidden_size, rule, fix="")

    def extra_config(self, model: Model) -> dict[str, Any]:
        """Return further entries; transformers 4 reads rope_theta, 5 reads rope_parameters."""
        return {
            "attention_dropout": 0.0,
            "head_dim": model.resolved_head_dim,
            "hidden_act": "silu",
            "mlp_bias": model.bias,
            "rope_theta": model.rope_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        }

    def settings(
        self, raw: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Problem]]:
        problems = []
        if (attention := raw.get("attention_bias", False)) != raw.get("mlp_bias", False):
            rule = f"must be as mlp_bias={raw.get('mlp_bias', False)}: our model has all biases or none"
            problems.append(config_problem("attention_bias", attention, rule))
        base, rope_problems = _rope_base(raw)
        settings = {
            "normalization": "rmsnorm",
            "position_embedding": "rope",
            "activation": "swiglu",
            "rope_base": base,
        }
        if values["num_query_groups"] is None:
            settings["num_query_groups"] = values["num_attention_heads"]
        return settings, problems + rope_problems


def _rope_base(raw: Mapping[str, Any]) -> tuple[float, list[Problem]]:
    """Return the base of plain rotary positions.

    transformers 4 has rope_theta and rope_scaling, 5 has rope_parameters.
    """
    problems = []
    bases = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        settings = raw.get(key) or {}
        if not isinstance(settings, dict):
            problems.append(config_problem(key, settings, "must be an object"))
            continue
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default" or settings.get("partial_rotary_factor", 1) != 1:
            problems.append(
                config_problem(key, settings, "must be plain rotary positions, rope_type=default")
            )
        bases += [settings["rope_theta"]] if "rope_theta" in settings else []
    if any(base != bases[0] for base in bases):
        problems.append(config_problem("rope_theta", bases, "must be the same wherever it is given"))
    return bases[0] if bases else DEFAULT_ROPE_BASE, problems

"""Our model settings and Hugging Face's `config.json`: which models both can say, and how each says it. Pure.

What only one of the two can say is refused by name, never approximated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from distllm.checkpoint.huggingface.names import Family
from distllm.config.problems import Problem, UserError
from distllm.config.schema import Model

EXPORTABLE = (
    "distllm exports Llama (rmsnorm, rope, swiglu, hidden_size a multiple of the heads) and GPT-2 "
    "(layernorm, learned, gelu or gelu_tanh, bias, as many query groups as heads, head_dim=null)"
)
IMPORTABLE = "distllm imports LlamaForCausalLM and GPT2LMHeadModel"
CLASSES: dict[Family, tuple[str, ...]] = {
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"),
}
# Our setting: (their key, the value that transformers takes where config.json does not say).
KEYS: dict[Family, dict[str, tuple[str, Any]]] = {
    "llama": {
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
    },
    "gpt2": {
        "num_layers": ("n_layer", None),
        "hidden_size": ("n_embd", None),
        "ffn_hidden_size": ("n_inner", None),
        "num_attention_heads": ("n_head", None),
        "seq_length": ("n_positions", 1024),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "init_std": ("initializer_range", 0.02),
    },
}
DEFAULT_ROPE_BASE = 10000.0
# Their key: the values that our model has, the first for a key that is not there.
ONLY: dict[Family, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "hidden_act": ("silu", "swish"),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1),
        "quantization_config": (None,),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
}
THEIR_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def family_of(model: Model) -> Family:
    """The family that `model` belongs to; a user error with all that keeps it from the nearest one."""
    problems: dict[Family, list[Problem]] = {
        "llama": list(_unlike_llama(model)),
        "gpt2": list(_unlike_gpt2(model)),
    }
    nearest = min(problems, key=lambda family: len(problems[family]))
    if problems[nearest]:
        raise UserError(problems[nearest])
    return nearest


def _unlike_llama(model: Model) -> Iterator[Problem]:
    yield from _unlike("Llama", model, normalization=["rmsnorm"], position_embedding=["rope"])
    yield from _unlike("Llama", model, activation=["swiglu"])
    if model.hidden_size % model.num_attention_heads:
        rule = f"transformers asks for a multiple of num_attention_heads={model.num_attention_heads}"
        yield Problem("model.hidden_size", model.hidden_size, rule, EXPORTABLE)


def _unlike_gpt2(model: Model) -> Iterator[Problem]:
    yield from _unlike("GPT-2", model, normalization=["layernorm"], position_embedding=["learned"])
    yield from _unlike("GPT-2", model, activation=["gelu_tanh", "gelu"], bias=[True])
    yield from _unlike("GPT-2", model, num_query_groups=[model.num_attention_heads])
    if model.resolved_head_dim * model.num_attention_heads != model.hidden_size:
        rule = "must be hidden_size / num_attention_heads in GPT-2, the nearest shape"
        yield Problem("model.head_dim", model.head_dim, rule, EXPORTABLE)


def _unlike(family: str, model: Model, **wanted: list[Any]) -> Iterator[Problem]:
    for name, values in wanted.items():
        if (value := getattr(model, name)) not in values:
            rule = f"must be {' or '.join(map(str, values))} in {family}, the nearest shape"
            yield Problem(f"model.{name}", value, rule, EXPORTABLE)


def to_their_config(model: Model, *, vocab_size: int, end_of_document: int, dtype: str) -> dict[str, Any]:
    """`config.json` of transformers 4 and 5. end_of_document: token id; it opens a text as well as closes it.

    transformers 4 reads torch_dtype and rope_theta, 5 reads dtype and rope_parameters.
    """
    family = family_of(model)
    config = {their_key: getattr(model, ours) for ours, (their_key, _) in KEYS[family].items()}
    config |= {
        "architectures": [CLASSES[family][0]],
        "model_type": family,
        "vocab_size": vocab_size,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "dtype": THEIR_DTYPES[dtype],
        "torch_dtype": THEIR_DTYPES[dtype],
        "use_cache": True,
    }
    if family == "gpt2":
        activation = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[model.activation]
        return config | {"activation_function": activation, **dict.fromkeys(DROPOUTS[1:], 0.0)}
    return config | {
        "attention_dropout": 0.0,
        "head_dim": model.resolved_head_dim,
        "hidden_act": "silu",
        "mlp_bias": model.bias,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
    }


def from_their_config(raw: Mapping[str, Any], *, name: str, vocab_multiple: int) -> tuple[Family, Model]:
    """The family and the model that a `config.json` describes; a user error with all that ours cannot be.

    name, vocab_multiple: the settings of ours that the file does not know.
    """
    family = _family(raw)
    problems = list(_not_ours(family, raw))
    values = {ours: raw.get(key, default) for ours, (key, default) in KEYS[family].items()}
    heads = values["num_attention_heads"]
    if family == "llama":
        base, rope_problems = _rope_base(raw)
        problems += rope_problems
        values |= {"normalization": "rmsnorm", "position_embedding": "rope", "activation": "swiglu"}
        values["rope_base"] = base
        if values["num_query_groups"] is None:
            values["num_query_groups"] = heads
    else:
        values |= {"normalization": "layernorm", "position_embedding": "learned", "bias": True}
        values |= {"rope_base": DEFAULT_ROPE_BASE, "num_query_groups": heads, "head_dim": None}
        values["activation"] = "gelu" if raw.get("activation_function") == "gelu" else "gelu_tanh"
        if values["ffn_hidden_size"] is None and isinstance(values["hidden_size"], int):
            values["ffn_hidden_size"] = 4 * values["hidden_size"]
    try:
        model = Model(**values, name=name, vocab_multiple=vocab_multiple)
    except ValidationError as error:
        raise UserError(problems + _invalid(family, error)) from error
    if problems:
        raise UserError(problems)
    if model.head_dim is not None and model.head_dim * model.num_attention_heads == model.hidden_size:
        model = dataclasses.replace(model, head_dim=None)  # as our configurations say it
    return family, model


def _family(raw: Mapping[str, Any]) -> Family:
    for family in CLASSES:
        if raw.get("model_type") == family:
            return family
    raise UserError([_problem("model_type", raw.get("model_type"), f"must be {' or '.join(CLASSES)}")])


def dropouts(raw: Mapping[str, Any]) -> list[str]:
    """Dropout that the file asks for in training; ours trains without, and the model is the same."""
    return [f"{key}={raw[key]}" for key in DROPOUTS if raw.get(key)]


def _not_ours(family: Family, raw: Mapping[str, Any]) -> Iterator[Problem]:
    architectures = raw.get("architectures") or [CLASSES[family][0]]
    if any(name not in CLASSES[family] for name in architectures):
        yield _problem("architectures", architectures, f"must be {CLASSES[family][0]}")
    for key, values in ONLY[family].items():
        if (value := raw.get(key, values[0])) not in values:
            shown = " or ".join(map(json.dumps, values))
            yield _problem(key, value, f"must be {shown}: our model has nothing else")
    if family == "llama" and (attention := raw.get("attention_bias", False)) != raw.get("mlp_bias", False):
        rule = f"must be as mlp_bias={raw.get('mlp_bias', False)}: our model has all biases or none"
        yield _problem("attention_bias", attention, rule)


def _rope_base(raw: Mapping[str, Any]) -> tuple[float, list[Problem]]:
    """The base of plain rotary positions, as transformers 4 (rope_theta, rope_scaling) or 5 spells them."""
    problems = []
    bases = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        settings = raw.get(key) or {}
        if not isinstance(settings, dict):
            problems.append(_problem(key, settings, "must be an object"))
            continue
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default" or settings.get("partial_rotary_factor", 1) != 1:
            problems.append(_problem(key, settings, "must be plain rotary positions, rope_type=default"))
        bases += [settings["rope_theta"]] if "rope_theta" in settings else []
    if any(base != bases[0] for base in bases):
        problems.append(_problem("rope_theta", bases, "must be the same wherever it is given"))
    return bases[0] if bases else DEFAULT_ROPE_BASE, problems


def _invalid(family: Family, error: ValidationError) -> list[Problem]:
    keys = {setting: key for setting, (key, _) in KEYS[family].items()} | {"rope_base": "rope_theta"}
    return [
        _problem(keys[setting], detail["input"], detail["msg"].replace("Input should", "must"))
        for detail in error.errors(include_url=False)
        if (setting := str(detail["loc"][0])) in keys  # others were derived from one of these
    ]


def _problem(key: str, value: object, rule: str) -> Problem:
    return Problem(f"config.json: {key}", value, rule, IMPORTABLE)

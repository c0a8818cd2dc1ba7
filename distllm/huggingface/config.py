"""Convert between our model settings and Hugging Face's `config.json`, for models that both support. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from distllm.config.problems import Problem, UserError
from distllm.config.registry import FAMILIES
from distllm.config.schema import Model
from distllm.model.families.huggingface import HuggingFaceForm, config_problem

THEIR_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


def forms() -> dict[str, HuggingFaceForm]:
    """Return {family: its form}, of the families that have one."""
    return {name: FAMILIES[name].huggingface for name in FAMILIES if FAMILIES[name].huggingface}


def form_of(model: Model) -> HuggingFaceForm:
    """Return the form of a model whose family has one: see `as_exported`."""
    form: HuggingFaceForm = FAMILIES[model.family].huggingface
    return form


def as_exported(model: Model) -> Model:
    """Return the same model in a family that transformers supports: its own, or the nearest.

    User error: everything that the nearest family cannot express.
    """
    found = {name: list(form.problems(model)) for name, form in forms().items()}
    # Of equally near ones its own, then the first of the table.
    nearest = min(found, key=lambda name: (len(found[name]), name != model.family))
    if found[nearest]:
        listed = " and ".join(form.exported_shapes for form in forms().values())
        raise UserError(list(_with_fix(found[nearest], f"distllm exports {listed}")))
    return dataclasses.replace(model, family=nearest)


def to_their_config(model: Model, *, vocab_size: int, end_of_document: int, dtype: str) -> dict[str, Any]:
    """Return `config.json` for transformers 4 and 5.

    end_of_document: token id; it begins a text as well as it ends one.

    transformers 4 reads torch_dtype, 5 reads dtype.
    """
    form = form_of(as_exported(model))
    config = {their_key: getattr(model, ours) for ours, (their_key, _) in form.keys.items()}
    config |= {
        "architectures": [form.classes[0]],
        "model_type": form.model_type,
        "vocab_size": vocab_size,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "dtype": THEIR_DTYPES[dtype],
        "torch_dtype": THEIR_DTYPES[dtype],
        "use_cache": True,
    }
    return config | form.extra_config(model)


def from_their_config(raw: Mapping[str, Any], *, name: str, vocab_multiple: int) -> Model:
    """Return the model that a `config.json` describes; a user error lists all that ours does not support.

    name, vocab_multiple: settings of ours that the file does not have.
    """
    family = _family(raw)
    form = forms()[family]
    problems = list(_not_ours(form, raw))
    values = {ours: raw.get(key, default) for ours, (key, default) in form.keys.items()}
    settings, more = form.settings(raw, values)
    problems += more
    try:
        model = Model(family=family, **values | settings, name=name, vocab_multiple=vocab_multiple)
    except ValidationError as error:
        raise _refusal(problems + _invalid(form, error)) from error
    if problems:
        raise _refusal(problems)
    if model.head_dim is not None and model.head_dim * model.num_attention_heads == model.hidden_size:
        model = dataclasses.replace(model, head_dim=None)  # as our configurations write it
    return model


def dropouts(raw: Mapping[str, Any]) -> list[str]:
    """List the file's dropout settings. Ours trains without dropout, and the model is otherwise the same."""
    return [f"{key}={raw[key]}" for key in DROPOUTS if raw.get(key)]


def _family(raw: Mapping[str, Any]) -> str:
    types = {form.model_type: family for family, form in forms().items()}
    if raw.get("model_type") not in types:
        raise _refusal([config_problem("model_type", raw.get("model_type"), f"must be {' or '.join(types)}")])
    return types[raw["model_type"]]


def _not_ours(form: HuggingFaceForm, raw: Mapping[str, Any]) -> Iterator[Problem]:
    architectures = raw.get("architectures") or [form.classes[0]]
    if any(name not in form.classes for name in architectures):
        yield config_problem("architectures", architectures, f"must be {form.classes[0]}")
    for key, values in form.only.items():
        if (value := raw.get(key, values[0])) not in values:
            shown = " or ".join(map(json.dumps, values))
            yield config_problem(key, value, f"must be {shown}: our model has nothing else")


def _invalid(form: HuggingFaceForm, error: ValidationError) -> list[Problem]:
    keys = {setting: key for setting, (key, _) in form.keys.items()} | {"rope_base": "rope_theta"}
    return [
        config_problem(keys[setting], detail["input"], detail["msg"].replace("Input should", "must"))
        for detail in error.errors(include_url=False)
        if (setting := str(detail["loc"][0])) in keys  # others were derived from one of these
    ]


def _refusal(problems: Iterable[Problem]) -> UserError:
    classes = " and ".join(form.classes[0] for form in forms().values())
    return UserError(list(_with_fix(problems, f"distllm imports {classes}")))


def _with_fix(problems: Iterable[Problem], fix: str) -> Iterator[Problem]:
    return (dataclasses.replace(problem, fix=fix) for problem in problems)

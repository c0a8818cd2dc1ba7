"""A family's form in the library transformers: class, `config.json` and names of tensors. Pure.

Features that only one of the two sides supports raise an error; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distllm.config.problems import Problem
from distllm.config.schema import Model
from distllm.layout.parameter import Parameter

LAYERS = "decoder.layers."


class HuggingFaceForm:
    """The form of one family: attributes for what most need, methods for the rest.

    name: what users call the family.
    model_type: theirs.
    classes: their names, first the one with an output projection.
    exported_shapes: what can be exported, in words.
    keys: setting of ours -> (their key, the value that transformers uses where config.json has none).
    only: their key -> the values that our model has, the first for a key that is not there.
    modules, layer_modules: module of ours (of a layer, without its number) -> modules of theirs; of several,
        each takes a part of the rows, in this order.
    layer_prefix: of theirs, with {} for the number.
    prefix: in front of the names of all tensors but the output projection's.
    """

    name: str
    model_type: str
    classes: tuple[str, ...]
    exported_shapes: str
    keys: Mapping[str, tuple[str, Any]]
    only: Mapping[str, tuple[Any, ...]]
    modules: Mapping[str, tuple[str, ...]]
    layer_modules: Mapping[str, tuple[str, ...]]
    layer_prefix: str
    prefix: str

    def problems(self, model: Model) -> Iterator[Problem]:
        """Yield settings of `model` that theirs does not support; `huggingface/config.py` adds the fix."""
        yield from ()

    def extra_config(self, model: Model) -> dict[str, Any]:
        """Return the entries of `config.json` beyond `keys`."""
        return {}

    def settings(
        self, raw: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Problem]]:
        """Return our settings beyond `keys` from their `config.json`, and what in it ours does not support.

        values: those given by `keys`; None for a key that is not there and has no default.
        """
        return {}, []

    def is_transposed(self, parameter: Parameter) -> bool:
        """Return whether theirs is [in, out]."""
        return False

    def their_names(self, parameter: Parameter) -> tuple[str, ...]:
        """Return the names of their tensors that hold the parameter, in the order of its rows."""
        module, _, kind = parameter.name.rpartition(".")
        if not module.startswith(LAYERS):
            return tuple(f"{theirs}.{kind}" for theirs in self.modules[module])
        number, _, module = module.removeprefix(LAYERS).partition(".")
        prefix = self.layer_prefix.format(number)
        return tuple(f"{prefix}{theirs}.{kind}" for theirs in self.layer_modules[module])

    def unlike(self, model: Model, **wanted: list[Any]) -> Iterator[Problem]:
        """Yield the settings of `model` that have none of the required values."""
        for setting, values in wanted.items():
            if (value := getattr(model, setting)) not in values:
                rule = f"must be {' or '.join(map(str, values))} in {self.name}, the nearest shape"
                yield Problem(f"model.{setting}", value, rule, fix="")


def config_problem(key: str, value: object, rule: str) -> Problem:
    """Report an entry of `config.json` that ours does not support; `huggingface/config.py` adds the fix."""
    return Problem(f"config.json: {key}", value, rule, fix="")

"""The tables of named parts that a setting chooses among. A new part is one file, and one line here.

A part is imported when it is first asked for, so a long table costs nothing. Parts outside of distllm
register themselves: `OPTIMIZERS.register("mine", "my_module:MINE")`, in a module that the environment
variable DISTLLM_PLUGINS names (several, separated by commas), which every rank imports before it reads its
configuration.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from distllm.config.problems import Problem, UserError

PLUGINS = "DISTLLM_PLUGINS"


class Registry:
    """A table from names to parts, or to their places: `module:attribute`."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self._parts = dict(parts)

    def register(self, name: str, part: Any) -> None:
        """Add a part, given itself or as `module:attribute`. A name that is taken gets the new part."""
        self._parts[name] = part

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Any:
        assert name in self._parts, f"{name} is none of {list(self._parts)}: the schema must refuse it"
        part = self._parts[name]
        if isinstance(part, str):
            part = self._parts[name] = imported(part)
        return part

    def choice(self, *others: str) -> BeforeValidator:
        """Return an annotation for a setting that holds one of the names, or one of `others`."""
        # Before the check of the type, so that values that are no strings also get the list of names.
        return BeforeValidator(Choice(self, others))


@dataclass(frozen=True)
class Choice:
    """Rejects values that are neither names of the registry at that time nor in `others`."""

    registry: Registry
    others: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [*self.registry, *self.others]

    def __call__(self, value: object) -> object:
        if value not in self.names:
            nearest = [*difflib.get_close_matches(str(value), self.names, n=1), self.names[0]][0]
            listed = [f"'{name}'" for name in self.names]
            rule = " or ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
            raise PydanticCustomError("choice", "must be {rule}", {"rule": rule, "nearest": nearest})
        return value


def imported(place: str) -> Any:
    """Import and return the object at `module:attribute`."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_plugins() -> None:
    """Import the modules of DISTLLM_PLUGINS; a `UserError` lists all that cannot be imported."""
    problems = []
    for module in filter(None, map(str.strip, os.environ.get(PLUGINS, "").split(","))):
        try:
            importlib.import_module(module)
        except Exception as error:  # any error in a plug-in's code
            rule = f"must be modules that can be imported: {type(error).__name__}: {error}"
            fix = f"put its folder on PYTHONPATH, or see what python -c 'import {module}' says"
            problems.append(Problem(PLUGINS, module, rule, fix))
    if problems:
        raise UserError(problems)


FAMILIES = Registry(
    {
        "llama": "distllm.model.families.llama:LLAMA",
        "gpt2": "distllm.model.families.gpt2:GPT2",
    }
)
OPTIMIZERS = Registry({"adamw": "distllm.optimizers.adamw:ADAMW"})
OBJECTIVES = Registry({"pretrain": "distllm.objectives.pretrain:Pretrain"})
SOURCES = Registry(
    {
        "text": "distllm.data.sources.text:TEXT",
        "jsonl": "distllm.data.sources.jsonl:JSONL",
        "parquet": "distllm.data.sources.parquet:PARQUET",
        "arrow": "distllm.data.sources.arrow:ARROW",
        "megatron": "distllm.data.sources.megatron:MEGATRON",
        "huggingface": "distllm.data.sources.huggingface:HUGGINGFACE",
        "stdlib": "distllm.data.sources.stdlib:STDLIB",
    }
)

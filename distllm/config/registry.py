"""The tables of named parts that a setting chooses among. A new part is one file, and one line here.

A part is imported when it is first asked for, so a long table costs nothing. What does not belong to distllm
registers itself: `OPTIMIZERS.register("mine", "my_module:MINE")`, in a module that the environment variable
DISTLLM_PLUGINS names (several with commas between them), which every rank imports before it reads its
configuration.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterator
from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

PLUGINS = "DISTLLM_PLUGINS"


class Registry:
    """Names, and for each a part or where it is: `module:attribute`."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self._parts = dict(parts)

    def register(self, name: str, part: Any) -> None:
        """part: the part itself, or `module:attribute`. A name that is taken gets the new part."""
        self._parts[name] = part

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Any:
        assert name in self._parts, f"{name} is none of {list(self._parts)}: the schema must refuse it"
        part = self._parts[name]
        if isinstance(part, str):
            module, _, attribute = part.partition(":")
            part = self._parts[name] = getattr(importlib.import_module(module), attribute)
        return part

    def choice(self, *others: str) -> BeforeValidator:
        """For the annotation of a setting that holds one of the names, or one of `others`."""

        def check(value: object) -> object:
            names = [*self._parts, *others]
            if value not in names:
                nearest = [*difflib.get_close_matches(str(value), names, n=1), names[0]][0]
                listed = [f"'{name}'" for name in names]
                rule = " or ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))
                raise PydanticCustomError("choice", "must be {rule}", {"rule": rule, "nearest": nearest})
            return value

        return BeforeValidator(check)  # before: what is no string at all gets the list of names too


def load_plugins() -> None:
    """Import the modules of DISTLLM_PLUGINS."""
    for module in filter(None, os.environ.get(PLUGINS, "").split(",")):
        importlib.import_module(module.strip())


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

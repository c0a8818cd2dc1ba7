"""The meaning and type of each setting, read from the schema: docstrings and annotations."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from distllm.config.registry import Choice
from distllm.config.validate import SECTIONS

PLAIN = {int: "integer", float: "number", str: "text", bool: "true | false", type(None): "null"}
BOUNDS = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
REQUIRED = object()  # the default of a setting that has none


@dataclass(frozen=True)
class Setting:
    """The description of a setting.

    name: dotted, as users write it. kind: its type, in readable form.
    default: of its class. A section has none, since `conf/` gives them; settings under a name that the user
        chooses (`data.sources.NAME`) have.
    """

    name: str
    kind: str
    meaning: str
    default: Any


def all_settings() -> list[Setting]:
    return [setting for name, section in SECTIONS.items() for setting in _settings(section, name)]


def _settings(section: type, prefix: str) -> Iterator[Setting]:
    told = meanings(section)
    hints = get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        assert field.name in told, f"the docstring of {section.__name__} does not say what {field.name} means"
        name, annotation = f"{prefix}.{field.name}", hints[field.name]
        yield Setting(name, readable(annotation), told[field.name], _default(field))
        place = {dict: "NAME", list: "N"}.get(get_origin(annotation))
        if place and isinstance(element := get_args(annotation)[-1], type) and is_dataclass(element):
            yield from _settings(element, f"{name}.{place}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def summary(section: type) -> str:
    """Return the part of a section's docstring that describes all of it."""
    return re.sub(r"\n{2,}", "\n\n", _entry(section).sub("\n", inspect.getdoc(section) or "")).strip()


def meanings(section: type) -> dict[str, str]:
    """Return {setting: meaning}; settings that the docstring does not explain are left out."""
    return {
        name: _in_full(entry["meaning"], name, section)
        for entry in _entry(section).finditer(inspect.getdoc(section) or "")
        for name in entry["names"].split(", ")
    }


def _in_full(meaning: str, name: str, section: type) -> str:
    """Return a meaning on one line, with references to another section resolved and None as null."""
    text = " ".join(meaning.split()).removesuffix(".")
    if pointer := re.match(r"as in `(\w+)`", text):
        other = vars(sys.modules[section.__module__])[pointer[1]]
        text = meanings(other)[name] + text[pointer.end() :]
    return re.sub(r"\bNone\b", "null", text)


def _entry(section: type) -> re.Pattern[str]:
    """Match `name: meaning` or `name, other: meaning`, at the start of a line or sentence.

    It ends before the next one or an empty line; names are only those of settings.
    """
    one = f"(?:{'|'.join(field.name for field in dataclasses.fields(section))})"
    names = rf"(?:^|(?<=\. )){one}(?:, {one})*"
    end = rf"(?={names}: |\n\n|\Z)"
    return re.compile(rf"(?P<names>{names}): (?P<meaning>.*?){end}", re.MULTILINE | re.DOTALL)


def readable(annotation: Any) -> str:
    """Return a type in readable form: `fp32 | bf16`, `integer > 0`, `text or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        parts = sorted(arguments, key=lambda part: part is type(None))
        are_choices = all(part in (bool, type(None)) or get_origin(part) is Literal for part in parts)
        return (" | " if are_choices else " or ").join(map(readable, parts))
    if origin is list:
        return f"list of {readable(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(readable, arguments))}]"
    if origin is dict:
        return f"{{NAME: {readable(arguments[1])}}}"
    if is_dataclass(annotation):
        return f"{{{', '.join(field.name for field in dataclasses.fields(annotation))}}}"
    return PLAIN[annotation]


def _bounded(annotation: Any, details: tuple[Any, ...]) -> str:
    bounds = []
    for detail in details:
        if isinstance(detail, BeforeValidator) and isinstance(detail.func, Choice):
            return " | ".join(detail.func.names)
        for bound in detail.metadata if isinstance(detail, FieldInfo) else []:
            if type(bound) in BOUNDS:
                sign, name = BOUNDS[type(bound)]
                bounds.append(f"{sign} {getattr(bound, name)}")
    return " ".join(filter(None, [readable(annotation), " and ".join(bounds)]))

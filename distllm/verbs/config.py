"""`distllm config [GROUP|GROUP.SETTING] [overrides]`: what each setting means, may be, and is by default.

Without torch. What is shown as the default is what the overrides make of it.
"""

from __future__ import annotations

import difflib
import json
import shutil
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from distllm.config.compose import Request, group_choices, to_plain
from distllm.config.meanings import REQUIRED, Setting, all_settings, summary
from distllm.config.problems import user_error
from distllm.config.schema import Config
from distllm.config.validate import SECTIONS
from distllm.metrics.format import WIDTH

NARROWEST = 60
WIDEST_DEFAULT = 16  # a longer one has lines of its own
MEANING_INDENT = " " * 6


def run(config: Config, request: Request) -> int:
    """Print the settings that the first argument names, or all of them."""
    width = max(NARROWEST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
    settings = _named(request.action)
    values = to_plain(config)
    choices = group_choices(request)
    blocks = []
    for group, members in groupby(settings, lambda setting: setting.name.partition(".")[0]):
        table = _table(list(members), values[group], width)
        is_part = "." in (request.action or "")
        blocks.append(table if is_part else f"{_heading(group, choices, width)}\n\n{table}")
    print("\n\n".join(blocks))
    return 0


def _named(word: str | None) -> list[Setting]:
    """The setting that is called `word`, or all those beneath it."""
    settings = all_settings()
    if word is None:
        return settings
    named = [setting for setting in settings if f"{setting.name}.".startswith(f"{word}.")]
    if not named:
        nearest = difflib.get_close_matches(word, [*SECTIONS, *(setting.name for setting in settings)], n=1)
        rule = f"must be a group, one of {', '.join(SECTIONS)}, or a setting of one, such as train.steps"
        raise user_error("group or setting", word, rule, " ".join(["distllm config", *nearest]))
    return named


def _heading(group: str, choices: dict[str, tuple[str, list[str]]], width: int) -> str:
    lines = [group]
    if group in choices:
        choice, options = choices[group]
        others = ", ".join(option for option in options if option != choice)
        lines = _wrapped(f"{group}={choice}" + (f"; there are also {others}" if others else ""), width)
    for paragraph in summary(SECTIONS[group]).split("\n\n"):
        lines += _wrapped(paragraph, width, "  ")
    return "\n".join(lines)


def _table(settings: Sequence[Setting], values: dict[str, Any], width: int) -> str:
    """Name, default and type in columns, and the meaning beneath."""
    defaults = [_written(_value(setting, values)) for setting in settings]
    name_width = max(len(setting.name) for setting in settings)
    default_width = max((len(text) for text in defaults if len(text) <= WIDEST_DEFAULT), default=0)
    lines = []
    for setting, default in zip(settings, defaults, strict=True):
        name = f"  {setting.name:<{name_width}}  "
        if len(default) <= WIDEST_DEFAULT:
            name += f"{default:<{default_width}}  "
            lines += _wrapped(setting.kind, width, name, " " * min(len(name), width // 2))
        else:
            lines += _wrapped(default, width, name, " " * len(name))
            lines += _wrapped(setting.kind, width, " " * len(name))
        lines += _wrapped(setting.meaning, width, MEANING_INDENT)
    return "\n".join(lines)


def _value(setting: Setting, values: dict[str, Any]) -> Any:
    """The job's own; beneath a NAME that is still to be given, what the schema would take."""
    _, name, *below = setting.name.split(".")
    return setting.default if below else values[name]


def _written(value: Any) -> str:
    if value is REQUIRED:
        return "required"
    is_plain = isinstance(value, str) and value and not set(value) & set(" \n\"'")
    return str(value) if is_plain else json.dumps(value)


def _wrapped(text: str, width: int, first: str = "", others: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=first if others is None else others,
        break_on_hyphens=False,
        break_long_words=False,
    )

"""Compare two configs, in the form of the command line. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

# {setting: (value in the first, value in the second)}
Changes = dict[str, tuple[str, str]]
PlainConfig = Mapping[str, Mapping[str, Any]]
UNSET = "unset"


def changed_settings(before: PlainConfig, now: PlainConfig, without: Collection[str] = ()) -> Changes:
    """Return the settings that differ.

    without: sections and settings that are not compared. A setting that only one has is `unset` in the other:
        an older distllm did not have it.
    """
    old, new = settings(before), settings(now)
    return {
        name: (old.get(name, UNSET), new.get(name, UNSET))
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not {name, name.partition(".")[0]} & set(without)
    }


def settings(config: PlainConfig) -> dict[str, str]:
    """Return {"section.name": value as it is written on the command line}."""
    return {
        f"{section}.{name}": value if isinstance(value, str) else json.dumps(value)
        for section, content in config.items()
        for name, value in content.items()
    }

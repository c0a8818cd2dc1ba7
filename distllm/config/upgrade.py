"""Convert configs that earlier versions stored to the present schema. Pure.

A setting that is added to the schema has a default that means "as before", so most changes need nothing here.
The others are written as one step from a format version of checkpoints to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PlainConfig = dict[str, dict[str, Any]]


def _from_3(config: PlainConfig) -> PlainConfig:
    """Name families, optimizers and objectives; there was one of each but for the family."""
    model, optimizer = config.get("model", {}), config.get("optimizer", {})
    family = "gpt2" if model.get("normalization") == "layernorm" else "llama"
    return config | {
        "model": {"family": family} | model,
        "optimizer": {"kind": "adamw"} | optimizer,
        "objective": {"kind": "pretrain"},
    }


# Format version -> how a config of that version becomes one of the next.
STEPS: dict[int, Callable[[PlainConfig], PlainConfig]] = {3: _from_3}


def upgraded(config: PlainConfig, format_version: int) -> PlainConfig:
    """Return the config of a checkpoint of `format_version`, as a checkpoint of this version has it."""
    while format_version in STEPS:
        config = STEPS[format_version](config)
        format_version += 1
    return config

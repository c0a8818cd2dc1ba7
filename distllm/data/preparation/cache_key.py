"""The place of a corpus or a tokenizer in the cache: a key of all that determines its content.

Inputs enter the key by path, size and time of change: to hash terabytes at each start would take hours.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.config.data_schema import Source
from distllm.data.cache import digest
from distllm.data.sources import InputFile, kind_of

FORMAT_VERSION = 2  # raise it when the same settings and inputs come to give other files


def cache_folder(data: schema.Data, kind: str, settings: dict[str, Any]) -> Path:
    key = digest(json.dumps(settings, sort_keys=True).encode())
    return Path(data.cache).expanduser().absolute() / f"{kind}-{key}"


def document_settings(
    source: Source, data: schema.Data, preparation: schema.Preparation, files: list[InputFile]
) -> dict[str, Any]:
    """Return the settings that determine which documents there are and to which split each belongs."""
    described = [[file.path, file.num_bytes, file.modified_ns] for file in files]
    return {
        "source": source.source,
        "text_field": None,  # and "python": of the kinds that say so; left out, it would be another key
        "subset": source.subset,
        "split": source.split,
        "validation_fraction": data.validation_fraction,
        "max_document_bytes": preparation.max_document_bytes,
        "python": None,
        "files": digest(json.dumps(described).encode()),
        **kind_of(source).identity(source),
    }


def libraries() -> dict[str, str]:
    """Return versions for readers of the manifest; in the key, each upgrade would retrain tokenizers."""
    names = ("tokenizers", "datasets", "numpy")
    return {"python": sys.version, **{name: version(name) for name in names}}

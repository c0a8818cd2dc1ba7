"""The record of a source in checkpoints and the ledger: enough to find it again and to say how it changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distllm.data.prepared import PreparedSource, Split

NUM_NAMED = 5  # changed files that a message lists


def to_record(source: PreparedSource, shuffle: bool, num_sequences: int) -> dict[str, Any]:
    """Return the record as JSON values, without the validation split, which is not trained on."""
    return {
        "folder": str(source.folder),
        "fingerprint": source.fingerprint,
        "train": asdict(source.train) | {"prefix": str(source.train.prefix)},
        "shuffle": shuffle,
        "num_sequences": num_sequences,
    }


def from_record(name: str, record: Mapping[str, Any]) -> PreparedSource:
    train = Split(**record["train"] | {"prefix": Path(record["train"]["prefix"])})
    return PreparedSource(name, Path(record["folder"]), train, None, record["fingerprint"])


def what_changed(before: Mapping[str, Any], now: PreparedSource) -> str:
    """Describe how a source differs from its record: by its input files where both lists still exist."""
    old_files, new_files = _input_files(Path(before["folder"])), _input_files(now.folder)
    if old_files is not None and new_files is not None and old_files != new_files:
        changes = [f"{path} is gone" for path in sorted(old_files.keys() - new_files.keys())]
        changes += [f"{path} is new" for path in sorted(new_files.keys() - old_files.keys())]
        changes += [
            f"{path} had {old_files[path][0]:,} bytes and has {new_files[path][0]:,}"
            if old_files[path][0] != new_files[path][0]
            else f"{path} was written again"
            for path in sorted(old_files.keys() & new_files.keys())
            if old_files[path] != new_files[path]
        ]
        more = f"; and {len(changes) - NUM_NAMED} more" if len(changes) > NUM_NAMED else ""
        return "; ".join(changes[:NUM_NAMED]) + more
    counts = [
        f"{what.removeprefix('num_')} {before['train'][what]:,} -> {getattr(now.train, what):,}"
        for what in ("num_documents", "num_tokens")
        if before["train"][what] != getattr(now.train, what)
    ]
    return ", ".join(counts) or "the same files, but another tokenizer, split or content"


def _input_files(folder: Path) -> dict[str, tuple[int, int | None]] | None:
    """Return {path: (bytes, time of change)} of the files that a folder was made from; None if unknown."""
    try:
        listed = json.loads((folder / "files.json").read_text())
    except (OSError, ValueError):
        return None
    return {path: (num_bytes, modified_ns) for path, num_bytes, modified_ns in listed}

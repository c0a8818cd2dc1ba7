"""Detect changed token files: by size and samples, cheap enough for every start."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from distllm.config.problems import user_error

NUM_BLOCKS = 64
BLOCK_BYTES = 1 << 16


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return for the manifest each file's size and a hash of samples. names: in `folder`, or absolute."""
    return {
        name: {"num_bytes": (folder / name).stat().st_size, "samples": sample_digest(folder / name)}
        for name in names
    }


def sample_digest(file: Path) -> str:
    """Hash blocks at fixed fractions of the file, the last one at its end; a small file is hashed whole."""
    digest = xxhash.xxh3_128()
    last = max(0, file.stat().st_size - BLOCK_BYTES)
    starts = sorted({last * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)})
    with file.open("rb", buffering=0) as stream:
        if last < NUM_BLOCKS * BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def check_token_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Check the files of a prepared corpus. User error: one is missing or has changed."""
    for name, known in manifest["token_files"].items():
        file = folder / name
        found = file.is_file()
        if found and file.stat().st_size == known["num_bytes"] and sample_digest(file) == known["samples"]:
            continue
        rule = "it has changed since it was prepared" if found else "it is missing"
        fix = f"remove {folder}, and it is prepared again"
        raise user_error("data.cache", file, f"must be as it was prepared; {rule}", fix)

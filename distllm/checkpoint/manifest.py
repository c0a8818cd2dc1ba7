"""The manifest of a checkpoint. It is written last: without it the checkpoint does not exist."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distllm.checkpoint.integrity import FileRecord, damage_of, hash_text
from distllm.checkpoint.storage import LOCAL, Storage
from distllm.config.problems import UserError, user_error
from distllm.config.upgrade import upgraded
from distllm.layout.place import Shape

FORMAT_VERSION = 4
OLDEST_FORMAT_VERSION = 3  # older ones have another layout of files
MANIFEST = "manifest.json"
HASH = "xxh3_128_of_the_rest"


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint.

    step: updates done.
    scalars: optimizer state that is one number for all parameters.
    details: JSON that the trainer adds to the tensors; its config in the format of this version.
    tensors: global shape of every parameter.
    states: dtype of every optimizer state, by the optimizer's own names.
    files: all but the manifest.
    """

    format_version: int
    step: int
    scalars: dict[str, float]
    details: dict[str, Any]
    tensors: dict[str, Shape]
    states: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.files.values())


def to_text(manifest: Manifest) -> str:
    """Return the file's content, which includes a hash of itself."""
    content = asdict(manifest)
    return json.dumps(content | {HASH: hash_text(_canonical(content))}, indent=1)


def read_manifest(path: Path, storage: Storage = LOCAL) -> Manifest:
    """Read the manifest of the checkpoint at `path`.

    OSError, ValueError, KeyError or TypeError: it is missing or invalid. User error: it is of another format
    version; such a checkpoint is not damaged, and skipping it would lose its work.
    """
    with storage.read(path / MANIFEST) as stream:
        raw = json.loads(stream.read())
    if not isinstance(raw, dict):
        raise TypeError("it is no JSON object")
    digest = raw.pop(HASH, None)
    if digest is not None and digest != hash_text(_canonical(raw)):
        raise ValueError("its content was altered")
    if not OLDEST_FORMAT_VERSION <= raw["format_version"] <= FORMAT_VERSION:
        age = "a newer" if raw["format_version"] > FORMAT_VERSION else "an older"
        raise user_error(
            "checkpoint",
            path,
            f"format version {raw['format_version']} was written by {age} distllm; "
            f"this one reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}",
            f"install {age} distllm, or move the checkpoint away to resume from an earlier one",
        )
    if digest is None:
        raise ValueError("it has no hash of itself")
    if "config" in raw["details"]:
        raw["details"]["config"] = upgraded(raw["details"]["config"], raw["format_version"])
    tensors = {name: tuple(shape) for name, shape in raw.pop("tensors").items()}
    files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
    return Manifest(tensors=tensors, files=files, **raw)


def find_damage(path: Path, storage: Storage = LOCAL, share: tuple[int, int] = (0, 1)) -> str | None:
    """Read a checkpoint and describe its first damage; None if it is good.

    share: (i, n) checks every n-th file from the i-th, so that n ranks together check all.
    """
    return next(damages(path, storage, share), None)


def damages(
    path: Path,
    storage: Storage = LOCAL,
    share: tuple[int, int] = (0, 1),
    damage_of: Callable[[Storage, Path, FileRecord], str | None] = damage_of,
) -> Iterator[str]:
    """Yield everything that `damage_of` finds wrong with a checkpoint's files, each as "file: what"."""
    try:
        manifest = read_manifest(path, storage)
    except UserError:  # a ValueError, too
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{MANIFEST}: {error!r}"
        return
    index, count = share
    for name in sorted(manifest.files)[index::count]:
        try:
            damage = damage_of(storage, path / name, manifest.files[name])
        except OSError as error:
            damage = f"cannot be read: {error}"
        if damage:
            yield f"{name}: {damage}"


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)

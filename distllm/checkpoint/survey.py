"""What lies in a folder of checkpoints, and what of it may go; without torch."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distllm.checkpoint.integrity import damage_of, size_damage_of
from distllm.checkpoint.manifest import Manifest, damages, find_damage, read_manifest
from distllm.checkpoint.retention import NAME, is_kept_for_good, list_checkpoints
from distllm.checkpoint.storage import LOCAL, Storage
from distllm.config.problems import UserError
from distllm.config.schema import Checkpoint

TEMPORARY = re.compile(r"(step_\d{8})\.tmp")
State = Literal["complete", "damaged", "unfinished", "other format"]


@dataclass(frozen=True)
class Entry:
    """A checkpoint, or what should have become one.

    state: `complete` as far as was looked; `unfinished` is a save that was cut short or is going on.
    step: None where neither manifest nor name tell it. problems: what is wrong with it, each with its file.
    num_bytes: on disk. manifest: None where there is none that makes sense.
    """

    path: Path
    step: int | None
    state: State
    problems: tuple[str, ...]
    num_bytes: int
    manifest: Manifest | None


def survey(folder: Path, storage: Storage = LOCAL) -> list[Entry]:
    """All that lies in the folder of a run's checkpoints, newest last; no file but the manifests is read."""
    names = [path for path in storage.ls(folder) if NAME.fullmatch(path.name) or is_temporary(path)]
    return [look_at(path, storage) for path in sorted(names, key=lambda path: path.name)]


def look_at(path: Path, storage: Storage = LOCAL, thorough: bool = False) -> Entry:
    """thorough: every byte is read; else only the manifest and the sizes of the files."""
    num_bytes = bytes_on_disk(path, storage)
    name = re.search(r"\d+", path.name)
    step = int(name.group()) if name else None
    if is_temporary(path):
        return Entry(path, step, "unfinished", (), num_bytes, None)
    try:
        found = tuple(damages(path, storage, damage_of=damage_of if thorough else size_damage_of))
    except UserError as error:
        rules = tuple(problem.rule for problem in error.problems)
        return Entry(path, step, "other format", rules, num_bytes, None)
    manifest = None
    with suppress(OSError, ValueError, KeyError, TypeError):  # told by `found`
        manifest = read_manifest(path, storage)
        step = manifest.step
    return Entry(path, step, "damaged" if found else "complete", found, num_bytes, manifest)


def is_temporary(path: Path) -> bool:
    return TEMPORARY.fullmatch(path.name) is not None


def bytes_on_disk(path: Path, storage: Storage = LOCAL) -> int:
    """Of a file, or of all files in a folder."""
    with suppress(FileNotFoundError):  # removed meanwhile, by the job that runs there
        if storage.is_file(path):
            return storage.size(path)
    return sum(bytes_on_disk(child, storage) for child in storage.ls(path))


@dataclass
class Pruning:
    """What retention makes of a folder, each newest first.

    kept: good, read to the last byte, and counted. for_good: stays whatever its state. doubtful: {path: why
    it does not count}; newer than the last one that counts, so that it stays. removed: goes.
    """

    kept: list[Path] = field(default_factory=list)
    for_good: list[Path] = field(default_factory=list)
    doubtful: dict[Path, str] = field(default_factory=dict)
    removed: list[Path] = field(default_factory=list)


def plan_pruning(folder: Path, settings: Checkpoint, storage: Storage = LOCAL) -> Pruning:
    """Keep `settings.keep` good checkpoints, and for good those of every `settings.keep_every` steps.

    Only what is older than the last that counts goes, and unfinished saves: where fewer are good than are to
    be kept, no complete checkpoint goes at all.
    """
    plan = Pruning()
    for path in reversed(list_checkpoints(folder, storage)):
        if len(plan.kept) < settings.keep:
            if why := _why_doubtful(path, storage):
                plan.doubtful[path] = why
            else:
                plan.kept.append(path)
        elif is_kept_for_good(path, settings):
            plan.for_good.append(path)
        else:
            plan.removed.append(path)
    plan.removed += [path for path in storage.ls(folder) if is_temporary(path)]
    return plan


def _why_doubtful(path: Path, storage: Storage) -> str | None:
    try:
        return find_damage(path, storage)
    except UserError as error:
        return error.problems[0].rule

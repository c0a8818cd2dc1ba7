"""Survey a folder of checkpoints, and plan what can be removed; without torch."""

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
    """A checkpoint, or a save that did not become one.

    state: `complete` as far as was checked; `unfinished` is a save that was interrupted or is in progress.
    step: None where neither manifest nor name gives it.
    problems: what is wrong with it, each with its file.
    num_bytes: on disk.
    manifest: None where it is missing or invalid.
    """

    path: Path
    step: int | None
    state: State
    problems: tuple[str, ...]
    num_bytes: int
    manifest: Manifest | None


def survey(folder: Path, storage: Storage = LOCAL) -> list[Entry]:
    """List the entries of a run's checkpoint folder, newest last; only the manifests are read."""
    names = [path for path in storage.ls(folder) if NAME.fullmatch(path.name) or is_temporary(path)]
    return [look_at(path, storage) for path in sorted(names, key=lambda path: path.name)]


def look_at(path: Path, storage: Storage = LOCAL, thorough: bool = False) -> Entry:
    """Examine a checkpoint. thorough: read every byte; else only the manifest and the sizes of the files."""
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
    with suppress(OSError, ValueError, KeyError, TypeError):  # reported by `found`
        manifest = read_manifest(path, storage)
        step = manifest.step
    return Entry(path, step, "damaged" if found else "complete", found, num_bytes, manifest)


def is_temporary(path: Path) -> bool:
    return TEMPORARY.fullmatch(path.name) is not None


def bytes_on_disk(path: Path, storage: Storage = LOCAL) -> int:
    """Return the size of a file, or of all files in a folder."""
    with suppress(FileNotFoundError):  # removed meanwhile, by the job that runs there
        if storage.is_file(path):
            return storage.size(path)
    return sum(bytes_on_disk(child, storage) for child in storage.ls(path))


@dataclass
class Pruning:
    """The effect of retention on a folder, each list newest first.

    kept: good, read to the last byte, and counted.
    for_good: never removed, whatever their state.
    doubtful: {path: why it does not count}; newer than the last one that counts, so they stay.
    removed: to be removed.
    """

    kept: list[Path] = field(default_factory=list)
    for_good: list[Path] = field(default_factory=list)
    doubtful: dict[Path, str] = field(default_factory=dict)
    removed: list[Path] = field(default_factory=list)


def plan_pruning(folder: Path, settings: Checkpoint, storage: Storage = LOCAL) -> Pruning:
    """Keep `settings.keep` good checkpoints, and always those of every `settings.keep_every` steps.

    Only checkpoints older than the last that counts are removed, and unfinished saves: where fewer are good
    than are to be kept, no complete checkpoint is removed.
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

"""Find checkpoints, choose the one to resume from, and remove old ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distllm.checkpoint.manifest import MANIFEST, find_damage
from distllm.checkpoint.storage import LOCAL, Storage
from distllm.config.problems import user_error
from distllm.config.schema import Checkpoint

NAME = re.compile(r"step_(\d{8})")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path, storage: Storage = LOCAL) -> list[Path]:
    """List complete checkpoints, oldest first. A folder without a manifest is a save that was interrupted."""
    found = [p for p in storage.ls(folder) if NAME.fullmatch(p.name) and storage.is_file(p / MANIFEST)]
    return sorted(found)


@dataclass(frozen=True)
class Choice:
    """The checkpoint to start from.

    path: the checkpoint to resume from, None to start from scratch.
    damaged: newer ones that were skipped, each with what is wrong.
    """

    path: Path | None
    damaged: tuple[str, ...] = ()


def candidates(folder: Path, settings: Checkpoint) -> list[Path]:
    """Return the checkpoints that `checkpoint.resume` allows, best first; empty for a fresh start."""
    existing = list_checkpoints(folder)
    if settings.resume == "never" and existing:
        raise user_error(
            "checkpoint.resume",
            "never",
            f"a fresh start needs a run.dir without checkpoints, and {folder} holds {len(existing)}",
            "choose another run.dir, or resume=auto",
        )
    if settings.resume in ("auto", "never") or existing:
        # Resuming from another run is a new start; a restart of that job continues from its own checkpoints.
        return existing[::-1]
    return [Path(settings.resume).expanduser()]


def choose(paths: Sequence[Path], find_damage: Callable[[Path], str | None] = find_damage) -> Choice:
    """Choose the first good one of `paths`. User error: there are some and none is good."""
    damaged: list[str] = []
    for path in paths:
        damage = find_damage(path)
        if damage is None:
            return Choice(path, tuple(damaged))
        damaged.append(f"{path.name}: {damage}")
    if damaged:
        raise user_error(
            "checkpoint",
            paths[0].parent,
            "a complete checkpoint is needed, and none is good: " + "; ".join(damaged),
            "restore one, name another with checkpoint.resume=PATH and a new run.dir, or move them away "
            "to start afresh",
        )
    return Choice(None)


def remove_old(newest: Path, settings: Checkpoint, storage: Storage = LOCAL) -> list[Path]:
    """Remove what retention does not keep, and unfinished saves; `newest` is known to be good.

    `settings.keep` checkpoints up to `newest` stay, and those of every `settings.keep_every` steps are never
    removed. Checkpoints of later steps can only be damaged: they do not count, and stay until they are
    replaced.
    """
    folder = newest.parent
    counted = [path for path in list_checkpoints(folder, storage) if path.name <= newest.name]
    removed = [path for path in counted[: -settings.keep] if not is_kept_for_good(path, settings)]
    removed += [path for path in storage.ls(folder) if re.fullmatch(r"step_\d{8}\.tmp", path.name)]
    for path in removed:
        remove(path, storage)
    return removed


def remove(path: Path, storage: Storage = LOCAL) -> None:
    """Remove a checkpoint, renaming it to an unfinished save first.

    A kill during removal would else leave a part of it under its own name, which nothing would ever remove.
    """
    if not path.name.endswith(".tmp"):
        condemned = path.with_name(f"{path.name}.tmp")
        storage.mv(path, condemned)
        path = condemned
    storage.rm(path)


def is_kept_for_good(path: Path, settings: Checkpoint) -> bool:
    return settings.keep_every > 0 and step_of(path) % settings.keep_every == 0

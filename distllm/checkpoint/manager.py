"""Which checkpoints there are, which one to resume from, and which may go."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from distllm.checkpoint.store import MANIFEST, find_damage
from distllm.config.problems import user_error
from distllm.config.schema import Checkpoint

NAME = re.compile(r"step_(\d{8})")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without a manifest is a save that was cut short."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MANIFEST).is_file())


@dataclass(frozen=True)
class Choice:
    """path: the checkpoint to resume from, None to start afresh. damaged: newer ones that were passed over,
    each with what is wrong."""

    path: Path | None
    damaged: tuple[str, ...] = ()


def choose_checkpoint(folder: Path, settings: Checkpoint) -> Choice:
    """The checkpoint that `checkpoint.resume` names: the newest good one, none, or a given one."""
    existing = list_checkpoints(folder)
    if settings.resume == "never":
        if existing:
            raise user_error(
                "checkpoint.resume",
                "never",
                f"a fresh start needs a run.dir without checkpoints, and {folder} holds {len(existing)}",
                "choose another run.dir, or resume=auto",
            )
        return Choice(None)
    if settings.resume != "auto":
        path = Path(settings.resume)
        if existing:  # resuming from elsewhere is a start; a restart of that job goes on with its own
            return _newest_good(existing)
        if damage := find_damage(path):
            raise user_error(
                "checkpoint.resume",
                path,
                f"a complete checkpoint is needed, but {damage}",
                "name another one",
            )
        return Choice(path)
    return _newest_good(existing)


def remove_old(newest: Path, keep: int) -> None:
    """Keep `keep` checkpoints up to `newest`, which was just written; drop older ones and unfinished saves.

    Of later steps there can only be damaged ones: they do not count, and stay until they are replaced.
    """
    folder = newest.parent
    for path in [path for path in list_checkpoints(folder) if path.name <= newest.name][:-keep]:
        shutil.rmtree(path)
    for path in folder.glob("step_*.tmp"):
        shutil.rmtree(path)


def _newest_good(existing: list[Path]) -> Choice:
    damaged: list[str] = []
    for path in reversed(existing):
        damage = find_damage(path)
        if damage is None:
            return Choice(path, tuple(damaged))
        damaged.append(f"{path.name}: {damage}")
    if damaged:
        raise user_error(
            "run.dir",
            existing[0].parent,
            "none of its checkpoints is good: " + "; ".join(damaged),
            "move them away to start afresh, or restore them",
        )
    return Choice(None)

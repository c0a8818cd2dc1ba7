"""One small file per rank in the run directory, rewritten every second, for the diagnosis of hangs.

It uses no store and no collective, since both may be what hangs.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
BEAT_SECONDS = 1.0
STALE_SECONDS = 5.0


@dataclass(frozen=True)
class Beat:
    """A rank's report on itself. time: seconds since the epoch, by its own clock.

    idle_seconds: since its last progress.
    collective: what its training thread waits for, None if it does not.
    stack: of its training thread, innermost first; only in the last beat before it ends.
    busy_seconds: per step, outside of communication, averaged.
    """

    rank: int
    pid: int
    host: str
    time: float
    step: int
    microbatch: int
    samples: tuple[int, int]
    phase: str
    idle_seconds: float
    collective: str | None
    busy_seconds: float
    stack: tuple[str, ...] = ()
    flight_recorder: Any = None


def beat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank_{rank:05}.json"


def write_beat(run_dir: Path, beat: Beat) -> None:
    """Write a beat atomically. Not durably: it is of no use after a crash of the machine."""
    path = beat_path(run_dir, beat.rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(beat)))
    os.replace(temporary, path)


def read_beats(run_dir: Path, world_size: int) -> dict[int, Beat]:
    """Read the beats of all ranks that have written one."""
    beats = {}
    for rank in range(world_size):
        try:
            raw = json.loads(beat_path(run_dir, rank).read_text())
            beats[rank] = Beat(**raw | {"samples": tuple(raw["samples"]), "stack": tuple(raw["stack"])})
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return beats


def age_seconds(path: Path) -> float:
    """Return a file's age by the clock of its file system, which all ranks share; infinite if missing.

    It touches a file beside it: machines' clocks may differ by more than a beat.
    """
    probe = path.parent / f".clock_{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except OSError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)

"""The one cause that ends a job: the rank that claims it first names it, all others end because of it.

Two files in the folder of the heartbeats. `claim` is created exclusively, which also a network file system
does once only. `cause` exists from the start and is empty: a file that grows is seen by whoever opens it,
while a file that appears may stay unseen for half a minute (NFS remembers names that do not exist).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

LONGEST_REASON = 500  # characters


@dataclass(frozen=True)
class Cause:
    """Why a job ends. rank: that says so. exit_code: with which the other ranks end."""

    rank: int
    reason: str
    exit_code: int


class Notice:
    """The notice of the cause, of one start of a job."""

    def __init__(self, folder: Path) -> None:
        self._claim = folder / "claim"
        self._cause = folder / "cause"

    def prepare(self) -> None:
        """Create the empty notice; on one rank, before any other may read it."""
        with suppress(OSError):
            self._cause.touch()

    def claim(self) -> bool:
        """Return whether this rank is the first to know a cause: then it must `tell` it.

        Where the disk takes no file nobody can tell, and every rank is the first.
        """
        try:
            os.close(os.open(self._claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    @property
    def is_claimed(self) -> bool:
        return self._claim.exists()

    def tell(self, cause: Cause) -> None:
        """Tell the others."""
        line = json.dumps(asdict(cause)) + "\n"
        with suppress(OSError):
            self._cause.write_text(line)

    def read(self) -> Cause | None:
        """Return the cause; None if there is none so far."""
        try:
            line = self._cause.read_text()
            return Cause(**json.loads(line)) if line.endswith("\n") else None
        except (OSError, ValueError, TypeError):
            return None

    def wait(self, seconds: float) -> Cause | None:
        """Return the cause as soon as it is told; None if it is not within `seconds`."""
        deadline = time.monotonic() + seconds
        while (cause := self.read()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return cause


def describe(error: BaseException) -> str:
    """Return an error as the reason of a cause: short."""
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]

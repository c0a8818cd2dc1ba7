"""How long a save takes, to know if it fits into the grace period after the signal to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distllm.layout.fragment import Fragment

PROBE_BYTES = 16 << 20


def expected_save_seconds(
    folder: Path,
    fragments: Iterable[Fragment],
    tensors_per_parameter: int,
    events: Iterable[Mapping[str, Any]],
) -> float | None:
    """Return the seconds that the next save is expected to take, None if they cannot be known.

    That is what the last save of the run took; for a new run, what writing this rank's bytes takes at the
    speed of a probe written to `folder`.
    """
    saves = [event["seconds"] for event in events if event["kind"] == "checkpoint" and "seconds" in event]
    if saves:
        return float(saves[-1])
    # Before the first step a fragment has only the weight, no optimizer states.
    num_bytes = tensors_per_parameter * sum(f.tensors["weight"].nbytes for f in fragments if f.writer)
    speed = _probe(folder)
    return num_bytes / speed if speed else None


def _probe(folder: Path) -> float | None:
    """Measure a durable write to `folder`; return its bytes per second, None if it fails."""
    file, begin = folder / ".probe", time.monotonic()
    try:
        with open(file, "wb") as stream:
            stream.write(os.urandom(PROBE_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        return PROBE_BYTES / max(time.monotonic() - begin, 1e-6)
    except OSError:
        return None
    finally:
        file.unlink(missing_ok=True)

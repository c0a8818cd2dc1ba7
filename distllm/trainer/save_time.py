"""Whether a save fits between the signal that asks a job to stop and the end of patience."""

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
    """What the last save of the run took; for a new run, what this rank's bytes take at the speed of a probe
    written to `folder`. None where neither can be known."""
    saves = [event["seconds"] for event in events if event["kind"] == "checkpoint" and "seconds" in event]
    if saves:
        return float(saves[-1])
    # Before the first step only the weight is there.
    num_bytes = tensors_per_parameter * sum(f.tensors["weight"].nbytes for f in fragments if f.writer)
    speed = _probe(folder)
    return num_bytes / speed if speed else None


def _probe(folder: Path) -> float | None:
    """Bytes per second of a durable write; None where it fails."""
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

"""The verdict on a hang, from the records of all ranks as one of them reads them, and its file."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from distllm.runtime.diagnosis import Diagnosis, judge
from distllm.runtime.heartbeat import Beat, Record

SHOWN_SUSPECTS = 64
SHOWN_RANKS = 256


@dataclass(frozen=True)
class Verdict:
    """diagnosis, and what it rests on: the last beat of each rank, and seconds without a sign of life."""

    diagnosis: Diagnosis
    beats: Mapping[int, Beat]
    ages: Mapping[int, float]

    def to_json(self, hang_seconds: float) -> str:
        """Return the content of `hang_STEP.json`."""
        content = {
            "suspects": self.diagnosis.suspects,
            "reason": self.diagnosis.reason,
            "hang_seconds": hang_seconds,
            "ranks": {
                rank: asdict(self.beats[rank]) | {"seconds_since_last_sign": round(self.ages[rank], 1)}
                for rank in shown_ranks(self.diagnosis.suspects, self.beats)
            },
        }
        return json.dumps(content, indent=1)


def find_verdict(
    records: Mapping[int, Record], earlier_counts: Mapping[int, int], world_size: int, seconds: float
) -> Verdict:
    """Judge from records. earlier_counts: of each rank's beats, `seconds` or more before they were read."""
    ages = ages_of({rank: record.count for rank, record in records.items()}, earlier_counts, seconds)
    beats = {rank: record.beat() for rank, record in records.items()}
    silent_after = seconds / 2
    return Verdict(judge(beats, ages, world_size, silent_after), beats, ages)


def ages_of(counts: Mapping[int, int], earlier: Mapping[int, int], seconds: float) -> dict[int, float]:
    """Return seconds since each rank's last sign of life: 0 if it has given one meanwhile."""
    return {rank: seconds if counts[rank] == earlier.get(rank) else 0.0 for rank in counts}


def shown_ranks(suspects: Iterable[int], ranks: Iterable[int]) -> list[int]:
    """Return whose beats the file shows: all, but of thousands some suspects and the first ranks."""
    known = set(ranks)
    blamed = [rank for rank in suspects if rank in known][:SHOWN_SUSPECTS]
    return sorted({*blamed, *sorted(known)[: SHOWN_RANKS - len(blamed)]})


def kill_if_stopped(beat: Beat | None) -> None:
    """Kill a stopped process: it ignores the agent's SIGTERM, and the agent waits 30 s before it kills."""
    if beat is None or beat.host != socket.gethostname():
        return
    try:
        state = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in ("T", "t"):
            os.kill(beat.pid, signal.SIGKILL)
    except OSError:
        return

"""What every rank tells of itself while it trains: one file per node, in it one record per rank.

It uses no store and no collective, since both may be what hangs. A rank overwrites its own record in place,
and a node writes no other node's file, so a run directory on NFS or Lustre has no locks to pass around. Every
write opens and closes the file, which is what makes it visible to other NFS clients.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
RECORD_BYTES = 8192
LARGEST_FREQUENT_WORLD = 64  # ranks up to which every rank beats once a second
STALE_BEATS = 5  # this many periods without a beat are a sign of death
READS_OF_TORN = 3
# checksum of all that follows it, length of the text, rank, number of the beat, busy seconds per step
_HEAD = struct.Struct("<IIIQd")
_CHECKSUM_BYTES = 4


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


@dataclass(frozen=True)
class Record:
    """A rank's record as it was read; only `beat` parses its text.

    count: of the rank's beats so far. A rank lives if it grows: that needs no clocks that agree.
    """

    rank: int
    count: int
    busy_seconds: float
    text: bytes

    def beat(self) -> Beat:
        raw = json.loads(self.text)
        return Beat(**raw | {"samples": tuple(raw["samples"]), "stack": tuple(raw["stack"])})


def beat_seconds(world_size: int) -> float:
    """Return the seconds between two beats: 1 up to 64 ranks, then the cube root of world_size / 64.

    A beat costs five operations: the rank opens, writes and closes its node's file, and opens and closes the
    file of the cause. At 1,024 ranks (2.5 s) that is 2,100 a second in all, at 16,384 (6.3 s) 12,900, three
    fifths of them metadata. It stays below 7 s there, so that a failure is seen within ten.
    """
    return max(1.0, (world_size / LARGEST_FREQUENT_WORLD) ** (1 / 3))


def stale_seconds(world_size: int) -> float:
    """Return after how many seconds without a beat a rank has stopped, died or blocks inside one call."""
    return STALE_BEATS * beat_seconds(world_size)


def new_folder(run_dir: Path) -> Path:
    """Make the folder of a start's heartbeats and remove those of earlier starts. Called on one rank.

    Every start has its own, so that it sees nothing of ranks that were killed. A disk that takes no folder is
    no reason not to train: ranks go without heartbeats then.
    """
    folder = run_dir / FOLDER / f"{time.time_ns():x}"
    with suppress(OSError):
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
        folder.mkdir(parents=True)
    return folder


def remove_folder(folder: Path) -> None:
    """Remove the heartbeats of a start that has succeeded."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


class BeatWriter:
    """Writes one rank's record. OSError from both methods as from `open`."""

    def __init__(self, folder: Path, rank: int, local_rank: int) -> None:
        # The first rank of the node is in the name too: nodes may share a host, or ranks lie unevenly.
        self._path = folder / f"node_{socket.gethostname()}_{rank - local_rank:05}"
        self._offset = local_rank * RECORD_BYTES
        self._count = 0
        self._flags = os.O_WRONLY | os.O_CREAT

    def write(self, beat: Beat) -> None:
        """Overwrite the record. Not durably: it is of no use after a crash of the machine."""
        self._count += 1
        descriptor = os.open(self._path, self._flags, 0o644)
        try:
            os.pwrite(descriptor, encode(beat, self._count), self._offset)
        finally:
            os.close(descriptor)
        self._flags = os.O_WRONLY  # a folder that was removed stays away


def encode(beat: Beat, count: int) -> bytes:
    """Return the record of a beat: at most RECORD_BYTES, its longest parts shortened."""
    text = _fitting_text(beat)
    head = _HEAD.pack(0, len(text), beat.rank, count, beat.busy_seconds)[_CHECKSUM_BYTES:]
    return struct.pack("<I", zlib.crc32(head + text)) + head + text


def decode(record: bytes) -> Record | None:
    """Return what a record holds; None if it was never written. ValueError: it is torn, read it again."""
    if not any(record[: _HEAD.size]):
        return None
    if len(record) < _HEAD.size:
        raise ValueError("a truncated record")
    checksum, length, rank, count, busy_seconds = _HEAD.unpack_from(record)
    end = _HEAD.size + length
    if end > len(record) or zlib.crc32(record[_CHECKSUM_BYTES:end]) != checksum:
        raise ValueError("a torn record")
    return Record(rank, count, busy_seconds, record[_HEAD.size : end])


def read_records(folder: Path) -> dict[int, Record]:
    """Read the records of all ranks: one read per node, a few bytes parsed per rank."""
    found = {}
    for path in folder.glob("node_*"):
        with suppress(OSError):
            found.update({record.rank: record for record in _read_node(path)})
    return found


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """Read the beats of a run's ranks, of whichever start."""
    records = (read_records(folder) for folder in (run_dir / FOLDER).glob("*"))
    return {rank: record.beat() for of_start in records for rank, record in of_start.items()}


def _read_node(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    for begin in range(0, len(data), RECORD_BYTES):
        for _ in range(READS_OF_TORN):
            try:
                record = decode(data[begin : begin + RECORD_BYTES])
            except ValueError:
                time.sleep(0.01)
                data = path.read_bytes()
                continue
            if record:
                yield record
            break


def _fitting_text(beat: Beat) -> bytes:
    """Return a beat as JSON that fits into a record: without the oldest collectives and the outer frames."""
    while True:
        text = json.dumps(asdict(beat)).encode()
        if len(text) <= RECORD_BYTES - _HEAD.size:
            return text
        recorded = beat.flight_recorder
        if isinstance(recorded, list) and len(recorded) > 4:
            beat = replace(beat, flight_recorder=recorded[len(recorded) // 4 :])
        elif len(beat.stack) > 4:
            beat = replace(beat, stack=beat.stack[: len(beat.stack) * 3 // 4])
        else:
            beat = replace(beat, stack=(), flight_recorder=None, phase=beat.phase[:99], host=beat.host[:99])
            return json.dumps(asdict(beat)).encode()[: RECORD_BYTES - _HEAD.size]

"""Heartbeats: few files, few operations, records that fit and are known when they are torn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distllm.runtime.heartbeat import (
    RECORD_BYTES,
    Beat,
    BeatWriter,
    beat_seconds,
    decode,
    encode,
    new_folder,
    read_beats,
    read_records,
    remove_folder,
    stale_seconds,
)

BEAT = Beat(3, 10, "host", 1.5, 5, 1, (40, 48), "train", 9.0, "all_reduce", 0.25)
OPERATIONS_OF_A_BEAT = 5


def test_the_load_on_the_file_system_is_bounded() -> None:
    assert beat_seconds(1) == beat_seconds(64) == 1
    assert beat_seconds(1024) == pytest.approx(2.52, abs=0.01)
    assert OPERATIONS_OF_A_BEAT * 1024 / beat_seconds(1024) < 2_100
    assert OPERATIONS_OF_A_BEAT * 16384 / beat_seconds(16384) < 13_000
    assert beat_seconds(16384) < 7, "a failure is seen within ten seconds"
    assert stale_seconds(8) == 5
    assert stale_seconds(16384) > 4 * beat_seconds(16384)


def test_a_record_is_what_was_written() -> None:
    beat = replace(BEAT, stack=("a:1 f", "b:2 g"), flight_recorder=[{"state": "started"}])
    record = decode(encode(beat, count=7))
    assert record
    assert (record.rank, record.count, record.busy_seconds) == (3, 7, 0.25)
    assert record.beat() == beat


@pytest.mark.parametrize("place", [0, 5, 20, 60])
def test_a_torn_record_is_known(place: int) -> None:
    data = bytearray(encode(BEAT, count=7))
    data[place] ^= 0xFF
    with pytest.raises(ValueError, match="torn"):
        decode(bytes(data))
    with pytest.raises(ValueError, match=r"torn|truncated"):
        decode(encode(BEAT, count=7)[:-1])
    assert decode(bytes(RECORD_BYTES)) is None, "never written"


def test_a_record_fits_whatever_there_is_to_tell() -> None:
    frames = tuple(f"/a/long/path/to/some/package/module_{i}.py:{i} function_{i}" for i in range(300))
    collectives = [{"profiling_name": f"nccl:all_reduce {i}", "state": "scheduled"} for i in range(300)]
    data = encode(replace(BEAT, stack=frames, flight_recorder=collectives), count=1)
    assert len(data) <= RECORD_BYTES
    record = decode(data)
    assert record
    beat = record.beat()
    assert beat.stack == frames[: len(beat.stack)], "the innermost"
    assert len(beat.stack) > 4
    assert beat.flight_recorder[-1] == collectives[-1], "the last"


def test_a_node_has_one_file_and_each_rank_its_place(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    writers = [BeatWriter(folder, rank, rank % 4) for rank in range(8)]
    for rank in (7, 2, 0, 5, 2):
        writers[rank].write(replace(BEAT, rank=rank, step=rank))
    assert len(list(folder.iterdir())) == 2
    records = read_records(folder)
    assert {rank: record.count for rank, record in records.items()} == {0: 1, 2: 2, 5: 1, 7: 1}
    assert read_beats(tmp_path)[7] == replace(BEAT, rank=7, step=7)
    # A shorter one over a longer one: nothing of the old is read.
    writers[0].write(replace(BEAT, rank=0, stack=("x" * 500,)))
    writers[0].write(replace(BEAT, rank=0))
    assert read_beats(tmp_path)[0] == replace(BEAT, rank=0)
    (node, *_) = sorted(folder.iterdir())
    with open(node, "r+b") as file:  # rank 2, torn for good: the others are read
        file.seek(2 * RECORD_BYTES + 40)
        file.write(b"#")
    assert set(read_records(folder)) == {0, 5, 7}


def test_a_start_sees_nothing_of_earlier_ones(tmp_path: Path) -> None:
    old = BeatWriter(new_folder(tmp_path), 0, 0)
    old.write(BEAT)
    folder = new_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        old.write(BEAT)
    assert read_beats(tmp_path) == {}
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []

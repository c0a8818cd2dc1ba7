"""However the work is cut up, interrupted and shared out: the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import BYTES, PREPARATION, contents, silent, start

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.cache import build_once
from distllm.data.preparation import workers
from distllm.data.preparation.corpus import Corpus
from distllm.data.preparation.prepare import merge, prepare, prepare_shard
from distllm.data.preparation.prepare_tokenizer import prepare_tokenizer
from distllm.data.preparation.shards import Shard
from distllm.data.preparation.splits import ORIGIN
from distllm.data.tokenizer import TextTokenizer

UNIT_BYTES = 2_000  # some 30 units of one.jsonl, and one of two.jsonl
TWO_WORKERS = replace(PREPARATION, workers=2)
BPE = replace(BYTES, kind="bpe", vocab_size=280)


@pytest.fixture
def data(tmp_path: Path) -> schema.Data:
    (tmp_path / "corpus").mkdir()
    lines = [
        json.dumps({"text": f"document {i}, " + "in a few words " * (i * 7919 % 23)}) for i in range(300)
    ]
    lines[250] = '{"text": nothing}'
    (tmp_path / "corpus/one.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "corpus/two.jsonl").write_text("\n".join(lines[:5]) + "\n[]\n")
    return schema.Data(
        source="jsonl",
        path=str(tmp_path / "corpus/*.jsonl"),
        text_field="text",
        validation_fraction=0.2,
        cache=str(tmp_path / "cache"),
    )


@pytest.fixture
def expected(data: schema.Data, tmp_path: Path) -> dict[str, bytes]:
    """As one process prepares it in one piece."""
    return only_contents(replace(data, cache=str(tmp_path / "undisturbed")), None)


def only_contents(data: schema.Data, unit_bytes: int | None = UNIT_BYTES) -> dict[str, bytes]:
    (source,) = prepare(data, PREPARATION, BPE, silent, unit_bytes).sources.values()
    return contents(source.folder)


def corpus(data: schema.Data, tokenizer: schema.Tokenizer = BPE) -> Corpus:
    folder = prepare_tokenizer(data, PREPARATION, tokenizer, silent)
    made = TextTokenizer.load(folder, tokenizer.end_of_document)
    return Corpus.find("jsonl", data, PREPARATION, made, folder, UNIT_BYTES)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_and_units_change_no_byte(
    data: schema.Data, expected: dict[str, bytes], num_workers: int
) -> None:
    preparation = replace(PREPARATION, workers=num_workers)
    (source,) = prepare(data, preparation, BPE, silent, UNIT_BYTES).sources.values()
    assert contents(source.folder) == expected
    assert source.num_quarantined == 2
    assert [folder.name for folder in Path(data.cache).glob("data-*/")] == [source.folder.name]


def test_tokenizing_needs_no_pool_where_it_is_little(
    data: schema.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distllm.data.preparation.workers.ProcessPoolExecutor", None)
    prepare(data, TWO_WORKERS, BPE, silent)


def test_rejected_rows_are_named_by_file_and_line(data: schema.Data, expected: dict[str, bytes]) -> None:
    folder = Path(data.cache).with_name("corpus")
    assert [json.loads(line) for line in expected["quarantine.jsonl"].splitlines()] == [
        {
            "file": str(folder / "one.jsonl"),
            "row": 250,
            "line": 251,
            "reason": "broken JSON",
            "detail": "Expecting value at column 10",
        },
        {
            "file": str(folder / "two.jsonl"),
            "row": 5,
            "line": 6,
            "reason": "broken JSON",
            "detail": "must be an object, not a list",
        },
    ]
    lines: list[str] = []
    (source,) = prepare(data, PREPARATION, BPE, lines.append, UNIT_BYTES).sources.values()
    told = f"set aside 2 rows of 2 files (2 broken JSON): {source.folder}/quarantine.jsonl"
    assert told in lines


def test_rows_of_row_groups_are_those_of_the_file(data: schema.Data, tmp_path: Path) -> None:
    rows = pa.table({"text": ["", *(f"document {i} " * 9 for i in range(98)), None]})
    pq.write_table(rows, tmp_path / "corpus/rows.parquet", row_group_size=10)
    parquet = replace(data, source="parquet", path=str(tmp_path / "corpus/rows.parquet"))
    (source,) = prepare(parquet, PREPARATION, BYTES, silent, unit_bytes=300).sources.values()
    entries = [json.loads(line) for line in (source.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in entries] == [0, 99]
    origins = [np.fromfile(source.folder / f"{name}.origins", ORIGIN) for name in ("train", "validation")]
    assert sorted(row for origin in origins for row in origin["row"].tolist()) == list(range(1, 99))
    lines: list[str] = []
    prepare_shard(
        replace(parquet, cache=f"{data.cache} 2"), PREPARATION, BYTES, Shard(0, 2), lines.append, 300
    )
    assert lines == ["shard 0/2: 5 of 10 pieces of parquet are complete"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_input_may_stop_the_job(data: schema.Data, num_workers: int) -> None:
    stopping = replace(PREPARATION, workers=num_workers, bad_input="stop")
    with pytest.raises(UserError, match=r"(one\.jsonl, line 251|two\.jsonl, line 6): broken JSON") as error:
        prepare(data, stopping, BPE, silent, UNIT_BYTES)
    assert error.value.problems[0].setting == "preparation.bad_input"
    prepare(data, PREPARATION, BPE, silent, UNIT_BYTES)
    with pytest.raises(UserError, match=r"one\.jsonl, line 251: broken JSON"):  # from the cache, too
        prepare(data, stopping, BPE, silent, UNIT_BYTES)


def test_a_document_that_is_too_long_is_put_aside(data: schema.Data, tmp_path: Path) -> None:
    (tmp_path / "corpus/zz.jsonl").write_text(json.dumps({"text": "long " * 1000}) + '\n{"text": "short"}\n')
    limited = replace(PREPARATION, max_document_bytes=1000)
    (source,) = prepare(data, limited, BPE, silent, UNIT_BYTES).sources.values()
    last = json.loads((source.folder / "quarantine.jsonl").read_text().splitlines()[-1])
    assert (Path(last["file"]).name, last["line"], last["reason"]) == ("zz.jsonl", 1, "too long")


@pytest.mark.long
def test_killed_again_and_again(data: schema.Data, tmp_path: Path) -> None:
    """SIGKILL of the whole process group at random moments, and at last when nothing but to join is left."""
    (tmp_path / "corpus/one.jsonl").write_text((tmp_path / "corpus/one.jsonl").read_text() * 8)
    seconds = random.Random(1)
    num_units = len(corpus(data).work().units)
    for kill in range(5):
        process = start(data, BPE, TWO_WORKERS, UNIT_BYTES)
        enough = len(whole_pieces(data)) + 10 if kill < 4 else num_units
        until(lambda: len(whole_pieces(data)) >= enough)  # noqa: B023
        time.sleep(seconds.random() / 20 if kill < 4 else 0)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not list(Path(data.cache).glob("data-*/manifest.json")), "killed before it was done"
    process = start(data, BPE, TWO_WORKERS, UNIT_BYTES)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "continues with 0 of" in output
    assert only_contents(data) == only_contents(replace(data, cache=str(tmp_path / "undisturbed")), None)
    assert not list(Path(data.cache).glob("*.pieces")), "the pieces are removed"
    assert not list(Path(data.cache).glob("*.unfinished"))


def test_what_is_whole_is_not_made_again(data: schema.Data, expected: dict[str, bytes]) -> None:
    prepare_shard(data, PREPARATION, BPE, Shard(0, 2), silent, UNIT_BYTES)
    pieces = corpus(data).pieces
    made = {piece: piece.stat().st_mtime_ns for piece in pieces.glob("*-*/")}
    (pieces / f"000001-x.{os.uname().nodename}.all.123.unfinished").mkdir()  # left by a killed process
    prepare_shard(data, PREPARATION, BPE, Shard(0, 2), silent, UNIT_BYTES)
    assert {piece: piece.stat().st_mtime_ns for piece in made} == made
    lines: list[str] = []
    prepare(data, PREPARATION, BPE, lines.append, UNIT_BYTES)
    num_units = len(corpus(data).work().units)
    assert f"continues with {num_units // 2} of {num_units} pieces; the others are complete" in lines
    assert only_contents(data) == expected


def test_one_killed_worker(data: schema.Data, expected: dict[str, bytes], tmp_path: Path) -> None:
    lines = (tmp_path / "corpus/one.jsonl").read_text() * 4  # long enough to be met at work
    (tmp_path / "corpus/one.jsonl").write_text(lines)
    process = start(data, BPE, TWO_WORKERS, UNIT_BYTES)
    until(lambda: len(whole_pieces(data)) > 3)
    os.kill(pool_workers(process.pid)[0], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "a worker was killed; its pieces are made anew" in output
    undisturbed = only_contents(replace(data, cache=str(tmp_path / "again")), None)
    assert only_contents(data) == undisturbed != expected


def test_workers_end_with_their_parent(data: schema.Data, tmp_path: Path) -> None:
    lines = (tmp_path / "corpus/one.jsonl").read_text() * 20
    (tmp_path / "corpus/one.jsonl").write_text(lines)
    process = start(data, BPE, TWO_WORKERS, UNIT_BYTES)
    until(lambda: len(whole_pieces(data)) > 3)
    workers_of_it = pool_workers(process.pid)
    assert len(workers_of_it) == 2
    process.kill()
    until(lambda: not any(is_alive(worker) for worker in workers_of_it))
    process.communicate()


def test_an_interrupt_ends_all_at_once(data: schema.Data, tmp_path: Path) -> None:
    lines = (tmp_path / "corpus/one.jsonl").read_text() * 20
    (tmp_path / "corpus/one.jsonl").write_text(lines)
    process = start(data, BPE, TWO_WORKERS, UNIT_BYTES)
    until(lambda: len(whole_pieces(data)) > 3)
    workers_of_it = pool_workers(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == -signal.SIGINT
    assert output.count("Traceback") == 1, f"that of the parent: {output}"
    assert not any(is_alive(worker) for worker in workers_of_it)
    assert not list(Path(data.cache).glob("*.unfinished"))


def test_workers_that_die_again_and_again(data: schema.Data, capfd: pytest.CaptureFixture[str]) -> None:
    made = corpus(data)
    work = replace(made.work(), tokenizer_folder=Path("/nowhere"))  # so that none can start
    made.pieces.parent.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="3 workers have died"):
        workers.make_pieces(work, range(len(work.units)), 2, made.tokenizer, silent)


def test_workers_of_several_threads(
    data: schema.Data, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine of four cores, where None means two workers of two threads."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    started: list[tuple[int, int]] = []
    make_in_workers = workers._make_in_workers

    def recording(work: Any, indices: list[int], size: Any, *others: Any) -> None:
        started.append((size.num_workers, size.num_threads))
        make_in_workers(work, indices, size, *others)

    monkeypatch.setattr(workers, "_make_in_workers", recording)
    preparation = replace(PREPARATION, workers=None)
    (source,) = prepare(data, preparation, BPE, silent, UNIT_BYTES).sources.values()
    assert started == [(2, 2)]
    assert contents(source.folder) == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_give_the_same_bytes(
    data: schema.Data, expected: dict[str, bytes], order: tuple[int, ...]
) -> None:
    for index in order:
        prepare_shard(data, PREPARATION, BPE, Shard(index, 3), silent, UNIT_BYTES)
    (source,) = merge(data, PREPARATION, BPE, silent, UNIT_BYTES).sources.values()
    assert contents(source.folder) == expected
    lines: list[str] = []
    prepare_shard(data, PREPARATION, BPE, Shard(1, 3), lines.append, UNIT_BYTES)
    assert lines == [f"jsonl is prepared already: {source.folder}"]


def test_shards_at_the_same_time(data: schema.Data, expected: dict[str, bytes]) -> None:
    processes = [start(data, BPE, PREPARATION, UNIT_BYTES, do) for do in ("0/2", "1/2", "1/2")]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert not list(corpus(data).pieces.glob("*.unfinished"))
    (source,) = merge(data, PREPARATION, BPE, silent, UNIT_BYTES).sources.values()
    assert contents(source.folder) == expected


def test_merge_names_the_shards_that_are_missing(data: schema.Data, expected: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match="pieces of jsonl are missing"):
        merge(data, PREPARATION, BPE, silent, UNIT_BYTES)
    lines: list[str] = []
    prepare_shard(data, PREPARATION, BPE, Shard(1, 4), lines.append, UNIT_BYTES)
    assert lines[-1].startswith("shard 1/4: ")
    with pytest.raises(UserError, match=r"those of shards 0, 2, 3 of 4\n"):
        merge(data, PREPARATION, BPE, silent, UNIT_BYTES)
    for index in (0, 2):
        prepare_shard(data, PREPARATION, BPE, Shard(index, 4), silent, UNIT_BYTES)
    with pytest.raises(UserError, match=r"those of shard 3 of 4\n"):
        merge(data, PREPARATION, BPE, silent, UNIT_BYTES)
    assert only_contents(data) == expected, "without a shard it does what is left"


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "0/0", "1/2/3", "\u0661/\u0662"])
def test_no_such_shard(text: str) -> None:
    with pytest.raises(UserError, match="must be INDEX/NUMBER"):
        Shard.parse(text)


def test_an_input_that_changes_meanwhile(data: schema.Data, tmp_path: Path) -> None:
    made = corpus(data)
    with (tmp_path / "corpus/two.jsonl").open("a") as file:
        file.write('{"text": "late"}\n')
    (tmp_path / "out").mkdir()
    Path(data.cache).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"no file may change while it is read; .*two\.jsonl has"):
        made.build(tmp_path / "out", silent)


def test_another_machine_was_faster(tmp_path: Path) -> None:
    """Without a common lock; it has removed the pieces that we are joining."""
    folder = tmp_path / "data-key"

    def build(unfinished: Path) -> dict[str, str]:
        folder.mkdir()
        (folder / "manifest.json").write_text('{"made": "elsewhere"}')
        raise FileNotFoundError("a piece")

    assert build_once(folder, build, silent) == {"made": "elsewhere"}
    assert not list(tmp_path.glob("*.unfinished"))


def whole_pieces(data: schema.Data) -> list[Path]:
    return [piece for piece in Path(data.cache).glob("*.pieces/*-*/") if "." not in piece.name]


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.01)


def pool_workers(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    return [child for child, command in commands.items() if "spawn_main" in command]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

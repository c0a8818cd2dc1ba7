from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from corpus import TEXTS, places, read, source, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.data.sources import Document, Rejected


def compress_zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": compress_zstd,
}


def lines(num: int) -> bytes:
    return b"".join(b'{"text": "line %d"}\n' % number for number in range(num))


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 10**6])
@pytest.mark.parametrize("name", ["plain.jsonl", "odd [x]*#::name.jsonl", "no_suffix", *PACKERS])
def test_json_lines_are_exact(tmp_path: Path, name: str, unit_bytes: int) -> None:
    rows = [json.dumps({"n": None, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(TEXTS)]
    content = ("\ufeff" + "\n\r\n".join(rows)).encode()  # a byte order mark, blank lines, no end of line
    file = tmp_path / (f"packed.jsonl.{name}" if name in PACKERS else name)
    file.write_bytes(PACKERS[name](content) if name in PACKERS else content)
    assert places(read(source("jsonl", file), unit_bytes)) == [(2 * i, text) for i, text in enumerate(TEXTS)]


def test_json_oddities(tmp_path: Path) -> None:
    rows = [
        '{"text": "a\\ud800b"}',
        '{"text": "\\ud83c\\udf89"}',
        '{"text": null}',
        '{"body": 1, "text": ""}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert places(read(source("jsonl", tmp_path / "a.jsonl"))) == [
        (0, "a\ufffdb"),
        (1, "🎉"),
        (2, "empty"),
        (3, "empty"),
    ]


BAD_LINES = [
    (b'{"text": "y"', "broken JSON", "column 13"),
    (b'["y"]', "broken JSON", "list"),
    (b"[" * 100_000, "broken JSON", "recursion"),
    (b'{"text": ' + b"1" * 10_000 + b"}", "broken JSON", "digits"),
    (b"nothing", "broken JSON", "column 1"),
    (b'{"text": "x"} {"text": "y"}', "broken JSON", "column 15"),
    (b'{"body": "x", "n": 1}', "missing field", "['body', 'n']"),
    (b'{"text": 5}', "not text", "int"),
    (b'{"text": ["x"]}', "not text", "list"),
    (b'{"text": "caf\xe9"}', "invalid UTF-8", "byte 13"),
    (b'{"text": ""}', "empty", ""),
    (b'{"text": "' + "é".encode() * 600 + b'"}', "too long", "1,200 bytes, 1,000 allowed"),
]


@pytest.mark.parametrize("unit_bytes", [50, 10**9])
def test_bad_lines_spoil_no_other(tmp_path: Path, unit_bytes: int) -> None:
    content = b"".join(b'\n{"text": "good"}\n' + line + b"\r\n" for line, _, _ in BAD_LINES)
    (tmp_path / "a.jsonl").write_bytes(content)
    results = read(source("jsonl", tmp_path / "a.jsonl"), unit_bytes, max_document_bytes=1000)
    expected = [
        place
        for i, (_, reason, _) in enumerate(BAD_LINES)
        for place in [(3 * i + 1, "good"), (3 * i + 2, reason)]
    ]
    assert places(results) == expected
    for result, (_, _, word) in zip(results[1::2], BAD_LINES, strict=True):
        assert isinstance(result, Rejected)
        assert word in result.detail


def test_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1, "body": "x"}')
    assert texts(read(source("jsonl", tmp_path / "a.jsonl", text_field="body"))) == ["x"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_members_are_joined(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(pack(lines(3)) + pack(b"") + pack(lines(2)))
    assert texts(read(source("jsonl", tmp_path / f"a.{suffix}"))) == [f"line {i}" for i in (0, 1, 2, 0, 1)]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["truncated", "nonsense"])
def test_broken_packed_files_give_their_good_lines(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](lines(100_000))
    packed = packed[: -len(packed) // 4] if damage == "truncated" else b"nonsense" * 10
    (tmp_path / f"a.{suffix}").write_bytes(packed)
    (tmp_path / "z.jsonl").write_bytes(lines(1))
    *good, end, other = read(source("jsonl", tmp_path / "*"))
    assert places(good) == [(i, f"line {i}") for i in range(len(good))]
    if damage == "truncated":
        assert len(good) > 30_000  # what the codec packed together is lost together
    assert isinstance(end, Rejected)
    assert (end.row, end.reason, end.detail.split(":")[0]) == (
        None,
        "unreadable file",
        f"after line {len(good)}",
    )
    assert places([other]) == [(0, "line 0")], "the next file is read"


JSON_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
LINE = st.one_of(
    JSON_TEXT.map(lambda text: json.dumps({"text": text}).encode()),
    JSON_TEXT.map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.binary(max_size=40).map(lambda content: content.replace(b"\n", b"")),
    st.just(b""),
)


@settings(deadline=None)
@given(
    content_lines=st.lists(LINE, min_size=1, max_size=20),
    line_end=st.sampled_from([b"\n", b"\r\n"]),
    last_line_end=st.booleans(),
    unit_bytes=st.integers(1, 200),
)
def test_units_of_a_file_are_the_file(
    content_lines: list[bytes], line_end: bytes, last_line_end: bool, unit_bytes: int
) -> None:
    content = line_end.join(content_lines) + line_end * last_line_end + b" "  # never an empty file
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.jsonl").write_bytes(content)
        corpus = source("jsonl", f"{folder}/a.jsonl")
        whole = read(corpus)
        assert read(corpus, unit_bytes) == whole
    for result in whole:
        assert result.row is not None
        line = content.split(b"\n")[result.row]
        if not isinstance(result, Rejected):
            assert json.loads(line.removeprefix(b"\xef\xbb\xbf"))["text"] == result.text


def test_a_long_line_is_passed_over_in_pieces(tmp_path: Path) -> None:
    """200 MB in one line, 1 MB allowed: the line is neither held nor read once for every unit."""
    file = tmp_path / "a.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"text": "before"}\n{"text": "')
        for _ in range(200):
            stream.write(b"x" * 1_000_000)
        stream.write(b'"}\n{"text": "after"}')
    tracemalloc.start()
    try:
        results = read(source("jsonl", file), 10_000_000, max_document_bytes=1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert places(results) == [(0, "before"), (1, "too long"), (2, "after")]
    assert isinstance(results[1], Rejected)
    assert "200,000,013 bytes" in results[1].detail
    assert peak < 30_000_000


def test_files_without_a_document_are_told(tmp_path: Path) -> None:
    """Beside one that has one: none of them is passed over in silence."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    first, *rejected = read(source("jsonl", f"{tmp_path}/*"))
    assert isinstance(first, Document)
    assert rejected == [Rejected(file, None, "empty", "the file holds no document") for file in (1, 2)]

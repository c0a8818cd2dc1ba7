"""Parquet and Arrow files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import TEXTS, WHOLE, places, read, source, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.config.problems import UserError
from distllm.data.sources import Document, Rejected, kind_of, list_files, plan_units
from distllm.data.sources.documents import Rows


def write_parquet(table: pa.Table, path: Path, rows: int = 2) -> None:
    pq.write_table(table, path, row_group_size=rows)


def write_arrow_file(table: pa.Table, path: Path, rows: int = 2) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def write_arrow_stream(table: pa.Table, path: Path, rows: int = 2) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


Write = Callable[[pa.Table, Path], None]
WRITERS: list[tuple[str, Write]] = [
    ("parquet", write_parquet),
    ("arrow", write_arrow_file),
    ("arrow", write_arrow_stream),
]
every_format = pytest.mark.parametrize(("kind", "write"), WRITERS)


def rows_of(kind: str, path: Path) -> Rows:
    """One after the other: `read` would hold all of them."""
    corpus = source(kind, path)
    files = list_files(corpus)
    [unit] = plan_units(corpus, files, WHOLE)
    return kind_of(corpus).read(corpus, files, 0, unit, max_document_bytes=None)


def column(texts: list[str | None], kind: pa.DataType) -> pa.Array:
    values = pa.array(texts, pa.string() if pa.types.is_dictionary(kind) else kind)
    return values.dictionary_encode() if pa.types.is_dictionary(kind) else values


@every_format
@pytest.mark.parametrize("unit_bytes", [1, 1000, 10**9])
@pytest.mark.parametrize(
    "text_type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()],
    ids=str,
)
def test_columns_are_exact_across_files_and_batches(
    tmp_path: Path, kind: str, write: Write, unit_bytes: int, text_type: pa.DataType
) -> None:
    for name, values in [("b.table", TEXTS), ("a [x]#::.table", TEXTS[::-1])]:
        numbers = list(range(len(values)))
        write(pa.table({"n": numbers, "body": column([*values], text_type)}), tmp_path / name)
    results = read(source(kind, tmp_path / "*.table", text_field="body"), unit_bytes)
    assert places(results) == [*enumerate(TEXTS[::-1]), *enumerate(TEXTS)]


@every_format
def test_bad_rows_spoil_no_other(tmp_path: Path, kind: str, write: Write) -> None:
    rows = [b"good", None, b"", b"caf\xe9", "é".encode() * 6, b"y" * 10]
    spoiled = pa.array(rows, pa.binary()).view(pa.string())
    write(pa.table({"text": spoiled}), tmp_path / "a")
    results = read(source(kind, tmp_path / "a"), 1, max_document_bytes=10)
    assert places(results) == [
        (0, "good"),
        (1, "empty"),
        (2, "empty"),
        (3, "invalid UTF-8"),
        (4, "too long"),
        (5, "y" * 10),
    ]
    assert [result.detail for result in results if isinstance(result, Rejected)][2:] == [
        "unexpected end of data at byte 3",
        "text of 12 bytes, 10 allowed",
    ]


@every_format
def test_one_file_without_the_column_is_rejected(tmp_path: Path, kind: str, write: Write) -> None:
    write(pa.table({"body": ["x"] * 9, "n": [1] * 9}), tmp_path / "a")
    write(pa.table({"text": [1] * 9}), tmp_path / "b")
    write(pa.table({"text": pa.nulls(1)}), tmp_path / "c")
    write(pa.table({"text": ["x"]}), tmp_path / "d")
    (tmp_path / "e").write_bytes(b"nonsense" * 100)
    results = read(source(kind, tmp_path / "*"), 1)
    assert places(results) == [
        (None, "missing field"),
        (None, "not text"),
        (0, "empty"),
        (0, "x"),
        (None, "unreadable file"),
    ]
    assert [result.detail for result in results if isinstance(result, Rejected)][:2] == [
        "no column 'text' among ['body', 'n']",
        "column 'text' holds int64",
    ]


@every_format
def test_a_column_that_no_file_has_is_refused(tmp_path: Path, kind: str, write: Write) -> None:
    write(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"data\.text_field=text(.|\n)*/a: .*\['body', 'n'\]"):
        read(source(kind, tmp_path / "*"))
    with pytest.raises(UserError, match=r"'n' holds int64"):
        read(source(kind, tmp_path / "*", text_field="n"))


def test_a_broken_row_group_is_left_out_alone(tmp_path: Path) -> None:
    values = [f"{number:04d}" * 100 for number in range(12)]
    for name in ("a", "b"):
        pq.write_table(
            pa.table({"text": values}), tmp_path / name, row_group_size=4, compression="zstd",
            write_page_checksum=True, use_dictionary=False,
        )  # fmt: skip
    content = bytearray((tmp_path / "a").read_bytes())
    chunk = pq.read_metadata(tmp_path / "a").row_group(1).column(0)
    for byte in range(chunk.total_compressed_size):
        content[chunk.data_page_offset + byte] ^= 255
    (tmp_path / "a").write_bytes(content)
    for unit_bytes in (1, 10**9):
        results = read(source("parquet", tmp_path / "*"), unit_bytes)
        [broken] = [result for result in results if isinstance(result, Rejected)]
        assert (broken.file, broken.row, broken.reason) == (0, None, "unreadable file")
        assert "row group 1, after 0 rows" in broken.detail
        rows = [result.row for result in results if result.row is not None]
        assert rows == [0, 1, 2, 3, 8, 9, 10, 11, *range(12)]


@pytest.mark.parametrize("write", [write_arrow_file, write_arrow_stream])
def test_a_truncated_arrow_file_is_rejected(tmp_path: Path, write: Write) -> None:
    write(pa.table({"text": ["x" * 100] * 10}), tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    *good, end = read(source("arrow", tmp_path / "a"))
    assert set(texts(good)) <= {"x" * 100}
    assert isinstance(end, Rejected)
    assert (end.row, end.reason) == (None, "unreadable file")
    assert len(good) == (4 if write is write_arrow_stream else 0)


@pytest.mark.parametrize("write", [write_arrow_file, write_arrow_stream, write_parquet])
def test_no_flipped_byte_ends_the_process(tmp_path: Path, write: Write) -> None:
    kind: str = "parquet" if write is write_parquet else "arrow"
    write(pa.table({"text": TEXTS}), tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    for byte in range(0, len(content), 7):
        broken = content[:byte] + bytes([content[byte] ^ 255]) + content[byte + 1 :]
        (tmp_path / "a").write_bytes(broken)
        with contextlib.suppress(UserError):  # the byte was in the column's name
            read(source(kind, tmp_path / "a"))


@every_format
def test_a_dictionary_is_not_multiplied(tmp_path: Path, kind: str, write: Callable[..., None]) -> None:
    """2.2 GB of text, more than a column of plain strings can hold, did each row have its own."""
    indices = pa.array([0, None, *[1] * 2200], pa.int32())
    write(
        pa.table({"text": pa.DictionaryArray.from_arrays(indices, ["x", "y" * 10**6])}), tmp_path / "a", 9999
    )
    sizes = [
        len(result.text) if isinstance(result, Document) else result.reason
        for result in rows_of(kind, tmp_path / "a")
    ]
    assert sizes == [1, "empty", *[10**6] * 2200]


def test_batches_are_small_in_bytes(tmp_path: Path) -> None:
    rows = 40
    table = pa.table({"text": [str(i) * 500_000 for i in range(10, 10 + rows)]})
    one_row_group = {"write_batch_size": 1, "data_page_size": 1_000_000, "compression": "none"}
    pq.write_table(table, tmp_path / "a", **one_row_group)
    del table
    before = pa.total_allocated_bytes()
    highest = 0
    count = 0
    for _ in rows_of("parquet", tmp_path / "a"):
        highest = max(highest, pa.total_allocated_bytes() - before)
        count += 1
    assert count == rows
    assert highest < 15_000_000


@settings(deadline=None)
@given(
    values=st.lists(
        st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=30
    ),
    rows=st.integers(1, 10),
    unit_bytes=st.integers(1, 1000),
    writer=st.sampled_from(WRITERS),
)
def test_units_of_a_file_are_the_file(
    values: list[str | None], rows: int, unit_bytes: int, writer: tuple[str, Callable[..., None]]
) -> None:
    kind, write = writer
    with tempfile.TemporaryDirectory() as folder:
        write(pa.table({"text": pa.array(values, pa.string())}), Path(folder, "a"), rows)
        corpus = source(kind, f"{folder}/a")
        assert places(read(corpus, unit_bytes)) == [(i, v or "empty") for i, v in enumerate(values)]


def test_row_groups_are_units(tmp_path: Path) -> None:
    write_parquet(pa.table({"text": ["x" * 1000] * 100}), tmp_path / "a", rows=10)
    corpus = source("parquet", tmp_path / "a")
    [file] = files = list_files(corpus)
    units = plan_units(corpus, files, file.num_bytes // 5)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert 0.9 < sum(unit.num_bytes for unit in units) / file.num_bytes <= 1

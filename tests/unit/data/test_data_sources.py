"""Finding files, cutting them into units, and the sources of one document per file."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus import TEXTS, places, read, source, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.config.problems import UserError
from distllm.data.sources import Document, InputFile, Rejected, list_files, plan_units, read_unit


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"reading local files must not use the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_text_files_are_exact_and_sorted_by_path(tmp_path: Path) -> None:
    names = [f"{number}.txt" for number in range(len(TEXTS))]
    names[0], names[3] = "z/1.txt", "c [x]*#::.txt"
    for name, text in zip(names, TEXTS, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "no.md").write_text("not matched")
    glob = source("text", tmp_path / "**/*.txt")
    files = list_files(glob)
    assert [file.path for file in files] == sorted(str(tmp_path / name) for name in names)
    for unit_bytes in (1, 30, 1000):
        results = read(glob, unit_bytes)
        assert {files[r.file].path: r.text for r in results if isinstance(r, Document)} == {
            str(tmp_path / name): text for name, text in zip(names, TEXTS, strict=True)
        }
        assert [(result.file, result.row) for result in results] == [(i, 0) for i in range(len(files))]
    assert len(read(source("text", tmp_path / names[3]))) == 1, "a file's own name is no pattern"


def test_files_have_size_and_time_of_change(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é")
    os.utime(tmp_path / "a.txt", ns=(5, 7))
    assert list_files(source("text", tmp_path / "*")) == [InputFile(str(tmp_path / "a.txt"), 2, 7)]


def test_relative_path_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(source("text", "*.txt")) == read(source("text", "~/*.txt")) == [Document("x", 0, 0)]


def test_bad_text_files_are_rejected_one_by_one(tmp_path: Path) -> None:
    contents = {"a": b"good", "b": b"", "c": b"good\xff", "d": b"x" * 11, "e": "é".encode() * 5}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "f").write_text("x")
    everything = source("text", tmp_path / "*")
    files = list_files(everything)
    (tmp_path / "f").unlink()  # since it was listed
    [unit] = plan_units(everything, files, 1000)
    *results, _ = read_unit(everything, files, unit, max_document_bytes=10)
    assert [getattr(result, "reason", "good") for result in results] == [
        "good",
        "empty",
        "invalid UTF-8",
        "too long",
        "good",
        "unreadable file",
    ]
    assert "byte 4" in getattr(results[2], "detail", "")
    assert results[3] == Rejected(3, 0, "too long", "text of 11 bytes, 10 allowed")
    assert getattr(results[5], "row", 0) is None
    assert "No such file" in getattr(results[5], "detail", "")


def test_details_stay_short() -> None:
    assert len(Rejected(0, 0, "broken JSON", "x" * 10_000).detail) == 200


def test_standard_library() -> None:
    library = source("stdlib", None)
    files = list_files(library)
    paths = [Path(file.path) for file in files]
    assert paths == sorted(paths)
    assert {"asyncio", "ast.py"} <= {*(p.name for p in paths), *(p.parent.name for p in paths)}
    assert not any("site-packages" in path.parts for path in paths)
    assert Path(sys.modules["os"].__file__ or "").resolve() in [path.resolve() for path in paths]
    results = read(library, 1 << 20)
    assert {result.reason for result in results if isinstance(result, Rejected)} == {"empty"}
    documents = {paths[result.file]: result.text for result in results if isinstance(result, Document)}
    [ast] = [path for path in documents if path.match("*/python*/ast.py")]
    assert documents[ast] == ast.read_bytes().decode()


def test_standard_library_files_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    library, files = source("stdlib", None), [InputFile(str(tmp_path / "bad.py"), 7, 0)]
    [unit] = plan_units(library, files, 1000)
    assert next(iter(read_unit(library, files, unit, None))) == Document("# caf\ufffd\n", 0, 0)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1),
    unit_bytes=st.integers(1, 150),
    kind=st.sampled_from(["text", "jsonl"]),
)
def test_units_cover_the_files_once_in_order(sizes: list[int], unit_bytes: int, kind: str) -> None:
    files = [InputFile(f"/{number}", size, 0) for number, size in enumerate(sizes)]
    covered: list[tuple[int, int]] = []
    units = plan_units(source(kind, "unused"), files, unit_bytes)
    for unit in units:
        if unit.start is None:
            covered += [(f, byte) for f in range(unit.first_file, unit.end_file) for byte in range(sizes[f])]
            assert unit.num_bytes <= unit_bytes or unit.end_file == unit.first_file + 1
        else:
            assert unit.end_file == unit.first_file + 1
            assert unit.stop is not None
            covered += [(unit.first_file, byte) for byte in range(unit.start, unit.stop)]
            assert unit.num_bytes <= unit_bytes
        assert unit.end_file > unit.first_file
    assert covered == [(file, byte) for file, size in enumerate(sizes) for byte in range(size)]
    assert sum(unit.num_bytes for unit in units) == sum(sizes)


def test_many_small_files_share_units() -> None:
    files = [InputFile(f"/{number}", 10, 0) for number in range(1000)]
    assert len(plan_units(source("text", "unused"), files, 1000)) == 10


def test_token_files_are_found_with_their_index(tmp_path: Path) -> None:
    tokens = source("megatron", tmp_path / "*")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs its index beside it, .*/a\.idx"):
        list_files(tokens)
    (tmp_path / "a.idx").write_bytes(b"x")
    assert [file.path for file in list_files(tokens)] == [str(tmp_path / "a.bin")]
    (tmp_path / "b.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"one \.bin file(.|\n)*'a\.bin', 'b\.bin'"):
        list_files(tokens)
    with pytest.raises(UserError, match=r"one \.bin file(.|\n)*\[\]"):
        list_files(source("megatron", tmp_path / "a.idx"))


def test_glob_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        list_files(source("text", "nothing/*.txt"))
    assert "data.path=nothing/*.txt" in str(error.value)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match=r"not a folder(.|\n)*data.path='.*/\*\*/\*"):
        list_files(source("text", tmp_path))
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="all 1 files are empty"):
        list_files(source("text", "*.txt"))


def test_reading_does_not_hang_on_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getpreferredencoding", lambda setlocale=True: "ISO-8859-1")
    (tmp_path / "a.jsonl").write_text('{"text": "日"}', encoding="utf-8")
    (tmp_path / "b.txt").write_text("日", encoding="utf-8")
    assert texts(read(source("jsonl", tmp_path / "a.jsonl"))) == ["日"]
    assert places(read(source("text", tmp_path / "b.txt"))) == [(0, "日")]

from __future__ import annotations

import gzip
import json
import locale
import socket
import sys
from pathlib import Path
from typing import Any, Literal

import datasets
import pytest

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.sources import Document, read_documents, source_files

Source = Literal["text", "jsonl", "parquet", "stdlib"]
TEXTS = ["2020-01-01", "a\r\nb\rc\n", "日本 🎉\u2028\x85 x", "", '{"x": 1}', "last\n\n"]


def settings(source: Source, path: Path | str | None, text_field: str = "text") -> schema.Data:
    path = None if path is None else str(path)
    return schema.Data(
        source=source, path=path, text_field=text_field, validation_fraction=0.0, cache="unused"
    )


def read(source: Source, path: Path | str | None, text_field: str = "text") -> list[Document]:
    data = settings(source, path, text_field)
    return list(read_documents(data, source_files(data)))


def texts_and_rows(documents: list[Document]) -> list[tuple[str, int]]:
    return [(document.text, document.row) for document in documents]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"reading local files must not use the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_text_files_are_exact_and_sorted_by_path(tmp_path: Path) -> None:
    for name, text in zip(["b/2.txt", "b/1.txt", "a.txt", "c [x]*#::.txt"], [*TEXTS[:3], "c"], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "no.md").write_text("not matched")
    documents = read("text", tmp_path / "**/*.txt")
    assert [Path(document.path).relative_to(tmp_path).as_posix() for document in documents] == [
        "a.txt",
        "b/1.txt",
        "b/2.txt",
        "c [x]*#::.txt",
    ]
    assert [document.text for document in documents] == [TEXTS[2], TEXTS[1], TEXTS[0], "c"]
    assert len(read("text", tmp_path / "c [x]*#::.txt")) == 1, "a file's own name is no pattern"


def test_relative_path_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("text", "*.txt") == read("text", "~/*.txt") == [Document("x", str(tmp_path / "a.txt"), 0)]


@pytest.mark.parametrize("name", ["plain.jsonl", "odd [x]*#::name.jsonl", "packed.jsonl.gz", "no_suffix"])
def test_json_lines_are_exact(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"n": None, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(TEXTS)]
    content = ("\ufeff" + "\n\r\n".join(lines)).encode()  # a byte order mark, blank lines, no end of line
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts_and_rows(read("jsonl", tmp_path / name)) == [(text, 2 * i) for i, text in enumerate(TEXTS)]


def test_json_lines_in_a_latin_1_locale_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getpreferredencoding", lambda setlocale: "ISO-8859-1")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="PYTHONUTF8=1"):
        read("jsonl", tmp_path / "a.jsonl")


def test_json_oddities(tmp_path: Path) -> None:
    lines = ['{"text": "a\\ud800b"}', '{"text": "\\ud83c\\udf89"}', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [document.text for document in read("jsonl", tmp_path / "a.jsonl")] == ["a\ufffdb", "🎉", ""]


def test_parquet_is_exact_across_files_and_row_groups(tmp_path: Path) -> None:
    for name, texts in [("b.parquet", TEXTS), ("a [x]#::.parquet", TEXTS[::-1])]:
        table = datasets.Dataset.from_dict({"n": list(range(len(texts))), "body": texts})
        table.to_parquet(tmp_path / "plain", batch_size=2)
        (tmp_path / "plain").rename(tmp_path / name)  # datasets itself cannot write under such a name
    documents = read("parquet", tmp_path / "*.parquet", "body")
    assert texts_and_rows(documents) == [
        *((text, row) for row, text in enumerate(TEXTS[::-1])),
        *((text, row) for row, text in enumerate(TEXTS)),
    ]


def test_nothing_is_left_in_the_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert len(read("jsonl", tmp_path / "a.jsonl")) == 1
    assert not (tmp_path / "cache").exists()


def test_standard_library() -> None:
    data = settings("stdlib", None)
    files = source_files(data)
    names = [file.name for file in files]
    assert files == sorted(files)
    assert {"asyncio", "ast.py", "dataclasses.py"} <= {*names, *(file.parent.name for file in files)}
    assert not any("site-packages" in file.parts for file in files)
    chosen = [file for file in files if file.name in ("ast.py", "os.py")]
    expected = [(file.read_bytes().decode(), 0) for file in chosen]
    assert texts_and_rows(list(read_documents(data, chosen))) == expected
    assert Path(sys.modules["os"].__file__ or "").resolve() in [file.resolve() for file in chosen]


def test_standard_library_files_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    [document] = read_documents(settings("stdlib", None), [tmp_path / "bad.py"])
    assert document.text == "# caf\ufffd\n"


@pytest.mark.parametrize(
    ("source", "name", "content", "setting", "words"),
    [
        ("text", "a.txt", b"", "data.path", ["empty"]),
        ("text", "a.txt", b"good\xff", "data.path", ["UTF-8", "byte 4"]),
        ("jsonl", "a.jsonl", b"good\xff", "data.path", ["UnicodeDecodeError"]),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "data.path", ["line 2", "column"]),
        ("jsonl", "a.jsonl", b'{"text": "x"}\n\n["y"]\n', "data.path", ["line 3", "list"]),
        ("jsonl", "a.jsonl", b'{"body": "x", "n": 1}\n', "data.text_field", ["line 1", "['body', 'n']"]),
        ("jsonl", "a.jsonl", b'{"text": 5}\n', "data.text_field", ["line 1", "int"]),
        ("jsonl", "a.jsonl.gz", gzip.compress(b"x" * 999)[:-9], "data.path", ["must be readable"]),
        ("parquet", "a.parquet", b"PAR1 and nonsense", "data.path", ["must be readable"]),
    ],
)
def test_user_errors_name_the_place(
    tmp_path: Path, source: Source, name: str, content: bytes, setting: str, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(source, tmp_path / name)
    assert error.value.problems[0].setting == setting
    for word in [*words, str(tmp_path / name)]:
        assert word in str(error.value)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["x"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has \['body', 'n'\]"):
        read("parquet", tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 1 of .* holds a int"):
        read("parquet", tmp_path / "a.parquet", "n")


def test_glob_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read("text", "nothing/*.txt")
    assert "data.path=nothing/*.txt" in str(error.value)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match=r"not a folder(.|\n)*data.path='.*/\*\*/\*"):
        read("text", tmp_path)

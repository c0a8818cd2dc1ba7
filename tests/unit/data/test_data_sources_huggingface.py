"""Data sets of the `datasets` library, all of them local."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
from corpora import BYTES, PREPARATION, silent
from corpus import TEXTS, places, read, source, texts

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.preparation.prepare import prepare
from distllm.data.sources import (
    Document,
    InputFile,
    Rejected,
    huggingface,
    huggingface_splits,
    kind_of,
    list_files,
    plan_units,
    read_unit,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"reading local data sets must not use the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache") / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def write_lines(path: Path, values: list[str], field: str = "text") -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps({field: value, "n": 1}) + "\n" for value in values))


@pytest.mark.parametrize("unit_bytes", [1, 10**9])
def test_a_folder_of_data_files(tmp_path: Path, shared_cache: Path, unit_bytes: int) -> None:
    folder = tmp_path / "od[d"
    write_lines(folder / "train-1 [x]*#.jsonl", TEXTS[:4])
    write_lines(folder / "train-2.jsonl", TEXTS[4:])
    write_lines(folder / "test.jsonl", ["test"])
    corpus = source("huggingface", folder)
    files = list_files(corpus)
    assert [file.path for file in files] == [
        f"{folder}:train {folder}/train-1 [x]*#.jsonl",
        f"{folder}:train {folder}/train-2.jsonl",
    ]
    assert [file.num_bytes for file in files] == [
        os.path.getsize(folder / name) for name in ("train-1 [x]*#.jsonl", "train-2.jsonl")
    ]
    assert len(plan_units(corpus, files, unit_bytes)) == (2 if unit_bytes == 1 else 1)
    assert places(read(corpus, unit_bytes)) == [*enumerate(TEXTS[:4]), *enumerate(TEXTS[4:])]
    assert texts(read(source("huggingface", folder, split="test"))) == ["test"]
    assert not shared_cache.exists(), "nothing is left in the shared cache"


def test_parquet_files_and_subsets(tmp_path: Path) -> None:
    for subset, values in [("en", ["hello"]), ("fr", TEXTS)]:
        (tmp_path / subset).mkdir()
        datasets.Dataset.from_dict({"text": values}).to_parquet(tmp_path / subset / "train.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("en", "fr"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    corpus = source("huggingface", tmp_path, subset="fr")
    assert texts(read(corpus)) == TEXTS
    assert list_files(corpus)[0].path.startswith(f"{tmp_path}/fr:train ")
    with pytest.raises(UserError, match=r"data\.subset=null(.|\n)*'en', 'fr'"):
        list_files(source("huggingface", tmp_path))
    with pytest.raises(UserError, match=r"data\.subset=de(.|\n)*'en', 'fr'"):
        list_files(source("huggingface", tmp_path, subset="de"))


@pytest.mark.parametrize(("unit_bytes", "num_units"), [(1, 7), (10**9, 1)])
def test_a_saved_data_set(tmp_path: Path, unit_bytes: int, num_units: int) -> None:
    dataset = datasets.Dataset.from_dict({"n": list(range(7)), "text": TEXTS})
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    corpus = source("huggingface", tmp_path / "saved")
    [file] = files = list_files(corpus)
    assert file.path == f"{tmp_path}/saved:train"
    assert file.num_bytes > 1000
    assert len(plan_units(corpus, files, unit_bytes)) == num_units
    assert places(read(corpus, unit_bytes)) == [*enumerate(TEXTS)]
    with pytest.raises(UserError, match=r"data\.split=test(.|\n)*\[\"train\"\]"):
        list_files(source("huggingface", tmp_path / "saved", split="test"))
    with pytest.raises(UserError, match=r"data\.subset=en"):
        list_files(source("huggingface", tmp_path / "saved", subset="en"))


def test_saved_splits(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert texts(read(source("huggingface", tmp_path))) == ["train"]
    assert texts(read(source("huggingface", tmp_path, split="test"))) == ["test"]
    with pytest.raises(UserError, match=r"data\.split=dev(.|\n)*\[\"train\", \"test\"\]"):
        list_files(source("huggingface", tmp_path, split="dev"))


def test_a_saved_data_set_that_is_broken(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"data\.path=(.|\n)*must be readable"):
        list_files(source("huggingface", tmp_path))


def test_bad_rows(tmp_path: Path) -> None:
    rows: list[str | None] = ["good", None, "", "é" * 6]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "a.parquet")
    results = read(source("huggingface", tmp_path), max_document_bytes=10)
    assert places(results) == [(0, "good"), (1, "empty"), (2, "empty"), (3, "too long")]


def test_a_broken_shard_spoils_no_other(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["a"])
    write_lines(tmp_path / "b.jsonl", ["b"], field="body")
    (tmp_path / "c.jsonl").write_text('{"text": "c", "n": 1}\n{"text": "d"\n')
    write_lines(tmp_path / "d.jsonl", ["d"])
    results = read(source("huggingface", tmp_path))
    assert [(r.file, r.text) for r in results if isinstance(r, Document)] == [(0, "a"), (3, "d")]
    rejected = [(r.file, r.row, r.reason) for r in results if isinstance(r, Rejected)]
    assert rejected == [(1, None, "unreadable file"), (2, None, "unreadable file")]


def test_errors_name_what_there_is(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ["x"])
    with pytest.raises(UserError, match=r"data\.split=dev(.|\n)*\[\"train\"\]"):
        list_files(source("huggingface", tmp_path, split="dev"))
    with pytest.raises(UserError, match=r"data\.text_field=body(.|\n)*\['text', 'n'\]"):
        list_files(source("huggingface", tmp_path, text_field="body"))
    with pytest.raises(UserError, match=r"data\.text_field=n(.|\n)*holds int64"):
        list_files(source("huggingface", tmp_path, text_field="n"))
    (tmp_path / "a::b.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"passes over files with '::'"):
        list_files(source("huggingface", tmp_path))
    with pytest.raises(UserError, match=r"data\.path=.*nothing\n.*Couldn't find any data file"):
        list_files(source("huggingface", tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.path=.*empty\n.*doesn't contain any data files"):
        list_files(source("huggingface", tmp_path / "empty"))


def test_a_data_set_that_changes_while_it_is_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ["x"])
    corpus = source("huggingface", tmp_path)
    old_files = list_files(corpus)
    [unit] = plan_units(corpus, old_files, 1000)
    write_lines(tmp_path / "train.jsonl", ["xy"])
    list_files(corpus)
    with pytest.raises(UserError, match="must not change while it is read"):
        list(read_unit(corpus, old_files, unit, None))


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_local_data_set_is_prepared(tmp_path: Path, is_saved: bool) -> None:
    """A shard has no path of this machine: whether it has changed meanwhile is asked of the library."""
    folder = tmp_path / "documents"
    if is_saved:
        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    else:
        write_lines(folder / "train-1.jsonl", TEXTS[:4])
        write_lines(folder / "train-2.jsonl", TEXTS[4:])
    corpus = source("huggingface", folder)
    files = list_files(corpus)
    data = schema.Data("huggingface", str(folder), "text", 0.0, str(tmp_path / "cache"))
    prepared = prepare(data, PREPARATION, BYTES, silent).sources["huggingface"]
    assert prepared.train.num_documents == len(TEXTS)
    assert kind_of(corpus).changed_file(corpus, files) is None
    if is_saved:
        datasets.Dataset.from_dict({"text": TEXTS[1:]}).save_to_disk(folder)
    else:
        write_lines(folder / "train-2.jsonl", TEXTS[5:])
    assert kind_of(corpus).changed_file(corpus, files) == files[-1]


def test_a_lost_hub_is_not_taken_for_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*arguments: Any) -> None:
        raise TimeoutError("lost")

    write_lines(tmp_path / "train.jsonl", ["x"])
    monkeypatch.setattr(
        huggingface_splits, "local_folder", lambda source: None
    )  # takes the folder for a name
    corpus = source("huggingface", tmp_path)
    assert texts(read(corpus)) == ["x"]
    monkeypatch.setattr(huggingface, "_tables", lose)
    with pytest.raises(UserError, match=r"the hub must be reachable \(TimeoutError: lost\)"):
        read(corpus)


def test_shards_of_unknown_size_are_units_of_their_own() -> None:
    files = [InputFile(f"owner/name:train {shard}", 0, None) for shard in range(3)]
    units = plan_units(source("huggingface", "owner/name"), files, 1000)
    assert [(unit.first_file, unit.end_file) for unit in units] == [(0, 1), (1, 2), (2, 3)]


def test_the_hub_cannot_be_reached() -> None:
    for name in ("someone/something", "something"):
        with pytest.raises(UserError, match=r"1 problem(.|\n)*the hub must be reachable") as error:
            list_files(source("huggingface", name))
        assert error.value.problems[0].setting == "data.path"

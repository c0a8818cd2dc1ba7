from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import BYTES, END, PREPARATION, contents, documents_of, silent, start

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.preparation.cache_key import document_settings
from distllm.data.preparation.prepare import prepare
from distllm.data.preparation.prepare_tokenizer import prepare_tokenizer
from distllm.data.preparation.splits import ORIGIN, is_held_out
from distllm.data.prepared import PreparedSource
from distllm.data.token_stream import TokenStream
from distllm.data.tokenizer import TextTokenizer

BPE = replace(BYTES, kind="bpe", vocab_size=270)
TEXTS = [f"document {i}\r\n日本 🎉 {END} " + "words words " * (i % 7) for i in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> schema.Data:
    (tmp_path / "corpus").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / f"corpus/{i:02}.txt").write_bytes(text.encode())
    return schema.Data(
        source="text",
        path=str(tmp_path / "corpus/*.txt"),
        text_field="text",
        validation_fraction=0.2,
        cache=str(tmp_path / "cache"),
    )


def prepare_one(
    data: schema.Data, tokenizer: schema.Tokenizer, report: Callable[[str], None]
) -> PreparedSource:
    (source,) = prepare(data, PREPARATION, tokenizer, report).sources.values()
    return source


def documents(prefix: Path, tokenizer: TextTokenizer) -> list[str]:
    found = documents_of(prefix)
    assert all(tokens[-1] == tokenizer.end_of_document for tokens in found)
    assert not any(tokenizer.end_of_document in tokens[:-1] for tokens in found)
    return [tokenizer.decode(tokens[:-1]) for tokens in found]


@pytest.mark.parametrize("settings", [BYTES, BPE])
def test_token_files_hold_the_documents_in_order(data: schema.Data, settings: schema.Tokenizer) -> None:
    everything = prepare(data, PREPARATION, settings, silent)
    tokenizer = TextTokenizer.load(everything.tokenizer_folder, END)
    assert everything.vocab_size == tokenizer.vocab_size
    assert everything.end_of_document == tokenizer.end_of_document
    assert list(everything.sources) == ["text"]
    prepared = everything.sources["text"]
    held_out = [text for text in TEXTS if is_held_out(text.encode(), 0.2)]
    trained_on = [text for text in TEXTS if text not in held_out]
    assert prepared.validation
    for split, expected in [(prepared.train, trained_on), (prepared.validation, held_out)]:
        assert documents(split.prefix, tokenizer) == expected
        stream = TokenStream(split.prefix)
        assert (split.num_documents, split.num_tokens) == (len(expected), stream.num_tokens)
        assert split.num_bytes == sum(len(text.encode()) for text in expected)
        assert split.max_token == stream.max_token() == tokenizer.end_of_document
        origins = np.fromfile(f"{split.prefix}.origins", ORIGIN)
        assert [TEXTS[origin["file"]] for origin in origins] == expected
        assert not origins["row"].any(), "every file is one row"
    files = json.loads((prepared.folder / "files.json").read_text())
    assert [Path(path).name for path, *_ in files] == [f"{i:02}.txt" for i in range(60)]


def test_second_time_is_from_the_cache(data: schema.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_one(data, BPE, silent)
    stamps = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    monkeypatch.setattr("distllm.data.preparation.corpus.make_pieces", None)
    monkeypatch.setattr("distllm.data.preparation.prepare_tokenizer.train_bpe", None)
    assert prepare_one(data, BPE, silent) == first
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == stamps


def test_another_cache_gets_the_same_bytes(data: schema.Data, tmp_path: Path) -> None:
    first = prepare_one(data, BPE, silent)
    second = prepare_one(replace(data, cache=str(tmp_path / "cache 2")), BPE, silent)
    assert first.folder != second.folder
    assert contents(first.folder) == contents(second.folder)
    assert first.fingerprint == second.fingerprint


def test_what_changes_the_key_and_the_fingerprint(data: schema.Data, tmp_path: Path) -> None:
    first = prepare_one(data, BYTES, silent)
    os.utime(tmp_path / "corpus/00.txt", ns=(1, 1))
    touched = prepare_one(data, BYTES, silent)
    assert touched.folder != first.folder
    assert touched.fingerprint == first.fingerprint, "the same text gives the same tokens"
    (tmp_path / "corpus/00.txt").write_text("other text")
    changed = prepare_one(data, BYTES, silent)
    (tmp_path / "corpus/zz.txt").write_text("one more")
    added = prepare_one(data, BYTES, silent)
    another_split = prepare_one(replace(data, validation_fraction=0.3), BYTES, silent)
    another_tokenizer = prepare_one(data, BPE, silent)
    everything = [first, touched, changed, added, another_split, another_tokenizer]
    assert len({prepared.folder for prepared in everything}) == 6
    assert len({prepared.fingerprint for prepared in everything}) == 5


def test_tokenizer_never_sees_validation_documents(data: schema.Data, tmp_path: Path) -> None:
    without = prepare_tokenizer(data, PREPARATION, BPE, silent)
    candidates = (f"qqxxqq{i} " * 50 for i in range(100))
    secret = next(text for text in candidates if is_held_out(text.encode(), 0.2))
    (tmp_path / "corpus/secret.txt").write_text(secret)
    held_out = prepare_tokenizer(data, PREPARATION, BPE, silent)
    seen = prepare_tokenizer(replace(data, validation_fraction=0.0), PREPARATION, BPE, silent)
    files = [(folder / "tokenizer.json").read_bytes() for folder in (without, held_out, seen)]
    assert files[0] == files[1] != files[2]


def test_split_is_by_text_so_duplicates_stay_together(data: schema.Data, tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"corpus/copy {i:02}.txt").write_bytes(text.encode())
    prepared = prepare_one(data, BYTES, silent)
    tokenizer = TextTokenizer.load(prepare_tokenizer(data, PREPARATION, BYTES, silent), END)
    assert prepared.validation
    train = documents(prepared.train.prefix, tokenizer)
    validation = documents(prepared.validation.prefix, tokenizer)
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 120


def test_share_of_held_out_documents() -> None:
    contents = [str(i).encode() for i in range(20_000)]
    small, large = ({c for c in contents if is_held_out(c, fraction)} for fraction in (0.02, 0.1))
    assert small < large, "a larger fraction only adds documents"
    assert len(small) == pytest.approx(400, abs=5 * 20)
    assert len(large) == pytest.approx(2000, abs=5 * 43)
    assert [i for i in range(40) if is_held_out(str(i).encode(), 0.2)] == [3, 6, 12, 21, 31, 34, 35]


def test_no_validation_wanted(data: schema.Data) -> None:
    prepared = prepare_one(replace(data, validation_fraction=0.0), BYTES, silent)
    assert prepared.validation is None
    assert prepared.train.num_documents == 60


def test_empty_documents_are_left_out_and_told(data: schema.Data, tmp_path: Path) -> None:
    (tmp_path / "corpus/empty.txt").touch()
    lines: list[str] = []
    prepared = prepare_one(data, BYTES, lines.append)
    assert prepared.validation
    assert prepared.train.num_documents + prepared.validation.num_documents == 60
    assert "left out 1 empty documents" in lines


def test_two_processes_at_once_do_the_work_once(data: schema.Data) -> None:
    processes = [start(data, BPE) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    lines = [line for output in outputs for line in output]
    assert sum(line.startswith("tokenized 60 files") for line in lines) == 1
    assert sum(line.startswith("trained a tokenizer") for line in lines) == 1


def test_finished_tokenizer(data: schema.Data, tmp_path: Path) -> None:
    folder = prepare_tokenizer(data, PREPARATION, BPE, silent)
    settings = replace(BYTES, kind="huggingface", path=str(folder))
    prepared = prepare(data, PREPARATION, settings, silent)
    assert (prepared.tokenizer_folder, prepared.vocab_size) == (folder, 270)
    assert prepared.fingerprints == prepare(data, PREPARATION, BPE, silent).fingerprints
    for wrong, setting in [
        (replace(settings, vocab_size=301), "tokenizer.vocab_size"),
        (replace(settings, special_tokens=["<|pad|>"]), "tokenizer.special_tokens"),
        (replace(settings, end_of_document="</s>"), "tokenizer.end_of_document"),
        (replace(settings, path=str(tmp_path)), "tokenizer.path"),
        (replace(settings, path=None), "tokenizer.path"),
    ]:
        with pytest.raises(UserError) as error:
            prepare_one(data, wrong, silent)
        assert error.value.problems[0].setting == setting
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=8192"):
        prepare_one(data, replace(BYTES, vocab_size=8192), silent)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=null"):
        prepare_one(data, replace(BPE, vocab_size=None), silent)


def test_text_too_small_for_the_vocabulary_is_told(data: schema.Data) -> None:
    lines: list[str] = []
    prepared = prepare(data, PREPARATION, replace(BPE, vocab_size=5000), lines.append)
    assert 257 < prepared.vocab_size < 5000
    assert any("too few for the 5,000 tokens" in line for line in lines)


def test_splits_without_documents(data: schema.Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds out none") as error:
        prepare_one(replace(data, validation_fraction=1e-9), BYTES, silent)
    assert error.value.problems[0].setting == "data.validation_fraction"
    with pytest.raises(UserError, match="all 60 are held out"):
        prepare_one(replace(data, validation_fraction=1 - 1e-9), BYTES, silent)
    (tmp_path / "nulls.jsonl").write_text('{"text": null}\n' * 3)
    nulls = replace(data, source="jsonl", path=str(tmp_path / "nulls.jsonl"))
    with pytest.raises(UserError, match="none has"):
        prepare_one(nulls, BYTES, silent)


def test_cache_that_cannot_be_created(data: schema.Data, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache="):
        prepare_one(replace(data, cache=str(tmp_path / "file/cache")), BYTES, silent)


def test_manifest_tells_where_the_data_came_from(data: schema.Data, tmp_path: Path) -> None:
    prepared = prepare_one(data, BYTES, silent)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["fingerprint"] == prepared.fingerprint
    assert manifest["train"]["num_tokens"] == prepared.train.num_tokens
    assert {"tokenizers", "numpy", "python"} <= set(manifest["libraries"])
    files = json.loads((prepared.folder / "files.json").read_text())
    status = (tmp_path / "corpus/00.txt").stat()
    assert files[0] == [str(tmp_path / "corpus/00.txt"), len(TEXTS[0].encode()), status.st_mtime_ns]


def test_other_python_other_standard_library(data: schema.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [replace(data, source="stdlib", path=None), data]
    sources: list[Any] = [(next(iter(job.named_sources.values())), job, PREPARATION, []) for job in jobs]
    before = [document_settings(*arguments) for arguments in sources]
    monkeypatch.setattr(sys, "version", "3.99.0")
    after = [document_settings(*arguments) for arguments in sources]
    assert before[0] != after[0]
    assert before[1] == after[1], "other corpora are not prepared anew for another Python"

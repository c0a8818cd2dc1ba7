from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.prepare import PreparedData, prepare, prepare_tokenizer
from distllm.data.splits import is_held_out
from distllm.data.token_stream import TokenStream
from distllm.data.tokenizer import TextTokenizer

END = "<|endoftext|>"
BYTES = schema.Tokenizer(kind="bytes", vocab_size=None, path=None, special_tokens=[], end_of_document=END)
BPE = replace(BYTES, kind="bpe", vocab_size=270)
TEXTS = [f"document {i}\r\n日本 🎉 {END} " + "words words " * (i % 7) for i in range(60)]

# Prepares in a process of its own: arguments are the corpus, the cache, and after how many documents to die.
SCRIPT = """
import os, signal, sys
from distllm.config import schema
from distllm.data import splits
from distllm.data.prepare import prepare
corpus, cache, deadly = sys.argv[1], sys.argv[2], int(sys.argv[3])
add = splits.SplitWriter.add
def add_or_die(self, content, tokens):
    global deadly
    deadly -= 1
    if deadly == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, content, tokens)
splits.SplitWriter.add = add_or_die
data = schema.Data(source="text", path=corpus, text_field="text", validation_fraction=0.2, cache=cache)
tokenizer = schema.Tokenizer(
    kind="bpe", vocab_size=270, path=None, special_tokens=[], end_of_document="<|endoftext|>"
)
prepared = prepare(data, tokenizer, lambda line: print(line, flush=True))
print(prepared.fingerprint)
"""


def start(data: schema.Data, deadly: int = 0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(data.path), data.cache, str(deadly)]
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


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


def silent(line: str) -> None:
    assert "\n" not in line, "a report is one line"


def token_bytes(prepared: PreparedData) -> dict[str, bytes]:
    """Everything but the manifests, which name the paths of this machine."""
    folders = (prepared.folder, prepared.tokenizer_folder)
    files = [file for folder in folders for file in folder.iterdir() if file.name != "manifest.json"]
    return {file.name: file.read_bytes() for file in files}


def documents(prefix: Path, tokenizer: TextTokenizer) -> list[str]:
    stream = TokenStream(prefix)
    edges = stream.document_offsets
    found = [stream.tokens[edges[i] : edges[i + 1]] for i in range(stream.num_documents)]
    assert all(tokens[-1] == tokenizer.end_of_document for tokens in found)
    assert not any(tokenizer.end_of_document in tokens[:-1] for tokens in found)
    return [tokenizer.decode(tokens[:-1].tolist()) for tokens in found]


@pytest.mark.parametrize("settings", [BYTES, BPE])
def test_token_files_hold_the_documents_in_order(data: schema.Data, settings: schema.Tokenizer) -> None:
    prepared = prepare(data, settings, silent)
    tokenizer = TextTokenizer.load(prepared.tokenizer_folder, END)
    assert (prepared.vocab_size, prepared.end_of_document) == (
        tokenizer.vocab_size,
        tokenizer.end_of_document,
    )
    held_out = [text for text in TEXTS if is_held_out(text.encode(), 0.2)]
    trained_on = [text for text in TEXTS if text not in held_out]
    assert prepared.validation
    for split, expected in [(prepared.train, trained_on), (prepared.validation, held_out)]:
        assert documents(split.prefix, tokenizer) == expected
        stream = TokenStream(split.prefix)
        assert (split.num_documents, split.num_tokens) == (len(expected), stream.num_tokens)
        assert split.num_bytes == sum(len(text.encode()) for text in expected)
        assert split.max_token == stream.max_token() == prepared.end_of_document


def test_second_time_is_from_the_cache(data: schema.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data, BPE, silent)
    stamps = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    monkeypatch.setattr("distllm.data.prepare.write_splits", None)
    monkeypatch.setattr("distllm.data.prepare.train_bpe", None)
    assert prepare(data, BPE, silent) == first
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == stamps


def test_another_cache_gets_the_same_bytes(data: schema.Data, tmp_path: Path) -> None:
    first = prepare(data, BPE, silent)
    second = prepare(replace(data, cache=str(tmp_path / "cache 2")), BPE, silent)
    assert first.folder != second.folder
    assert token_bytes(first) == token_bytes(second)
    assert first.fingerprint == second.fingerprint


def test_what_changes_the_key_and_the_fingerprint(data: schema.Data, tmp_path: Path) -> None:
    first = prepare(data, BYTES, silent)
    os.utime(tmp_path / "corpus/00.txt", ns=(1, 1))
    touched = prepare(data, BYTES, silent)
    assert touched.folder != first.folder
    assert touched.fingerprint == first.fingerprint, "the same text gives the same tokens"
    (tmp_path / "corpus/00.txt").write_text("other text")
    changed = prepare(data, BYTES, silent)
    (tmp_path / "corpus/zz.txt").write_text("one more")
    added = prepare(data, BYTES, silent)
    another_split = prepare(replace(data, validation_fraction=0.3), BYTES, silent)
    another_tokenizer = prepare(data, BPE, silent)
    everything = [first, touched, changed, added, another_split, another_tokenizer]
    assert len({prepared.folder for prepared in everything}) == 6
    assert len({prepared.fingerprint for prepared in everything}) == 5


def test_tokenizer_never_sees_validation_documents(data: schema.Data, tmp_path: Path) -> None:
    without = prepare_tokenizer(data, BPE, silent)
    candidates = (f"qqxxqq{i} " * 50 for i in range(100))
    secret = next(text for text in candidates if is_held_out(text.encode(), 0.2))
    (tmp_path / "corpus/secret.txt").write_text(secret)
    held_out = prepare_tokenizer(data, BPE, silent)
    seen = prepare_tokenizer(replace(data, validation_fraction=0.0), BPE, silent)
    files = [(folder / "tokenizer.json").read_bytes() for folder in (without, held_out, seen)]
    assert files[0] == files[1] != files[2]


def test_split_is_by_text_so_duplicates_stay_together(data: schema.Data, tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"corpus/copy {i:02}.txt").write_bytes(text.encode())
    prepared = prepare(data, BYTES, silent)
    tokenizer = TextTokenizer.load(prepared.tokenizer_folder, END)
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
    prepared = prepare(replace(data, validation_fraction=0.0), BYTES, silent)
    assert prepared.validation is None
    assert prepared.train.num_documents == 60


def test_empty_documents_are_left_out_and_told(data: schema.Data, tmp_path: Path) -> None:
    (tmp_path / "corpus/empty.txt").touch()
    lines: list[str] = []
    prepared = prepare(data, BYTES, lines.append)
    assert prepared.validation
    assert prepared.train.num_documents + prepared.validation.num_documents == 60
    assert "left out 1 empty documents" in lines


def test_two_processes_at_once_do_the_work_once(data: schema.Data) -> None:
    processes = [start(data) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1]
    lines = [line for output in outputs for line in output]
    assert sum(line.startswith("tokenized 60 files") for line in lines) == 1
    assert sum(line.startswith("trained a tokenizer") for line in lines) == 1


def test_killed_preparation_leaves_nothing_that_is_used(data: schema.Data, tmp_path: Path) -> None:
    process = start(data, deadly=20)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    cache = Path(data.cache)
    assert [folder.name.endswith(".unfinished") for folder in cache.glob("data-*/")] == [True]
    prepared = prepare(data, BPE, silent)
    whole = prepare(replace(data, cache=str(tmp_path / "cache 2")), BPE, silent)
    assert token_bytes(prepared) == token_bytes(whole)
    assert not list(cache.glob("*.unfinished"))


def test_failed_preparation_leaves_nothing_and_can_be_repeated(data: schema.Data, tmp_path: Path) -> None:
    (tmp_path / "corpus/zz.txt").write_bytes(b"\xff")
    for _ in range(2):
        with pytest.raises(UserError, match=r"zz\.txt"):
            prepare(data, BYTES, silent)
    assert not list(Path(data.cache).glob("data-*/"))
    (tmp_path / "corpus/zz.txt").write_text("repaired")
    assert prepare(data, BYTES, silent).train.num_documents > 0


def test_finished_tokenizer(data: schema.Data, tmp_path: Path) -> None:
    folder = prepare_tokenizer(data, BPE, silent)
    settings = replace(BYTES, kind="huggingface", path=str(folder))
    prepared = prepare(data, settings, silent)
    assert (prepared.tokenizer_folder, prepared.vocab_size) == (folder, 270)
    assert prepared.fingerprint == prepare(data, BPE, silent).fingerprint
    for wrong, setting in [
        (replace(settings, vocab_size=301), "tokenizer.vocab_size"),
        (replace(settings, special_tokens=["<|pad|>"]), "tokenizer.special_tokens"),
        (replace(settings, end_of_document="</s>"), "tokenizer.end_of_document"),
        (replace(settings, path=str(tmp_path)), "tokenizer.path"),
        (replace(settings, path=None), "tokenizer.path"),
    ]:
        with pytest.raises(UserError) as error:
            prepare(data, wrong, silent)
        assert error.value.problems[0].setting == setting
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=8192"):
        prepare(data, replace(BYTES, vocab_size=8192), silent)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size=null"):
        prepare(data, replace(BPE, vocab_size=None), silent)


def test_text_too_small_for_the_vocabulary_is_told(data: schema.Data) -> None:
    lines: list[str] = []
    prepared = prepare(data, replace(BPE, vocab_size=5000), lines.append)
    assert 257 < prepared.vocab_size < 5000
    assert any("too few for the 5,000 tokens" in line for line in lines)


def test_splits_without_documents(data: schema.Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds out none") as error:
        prepare(replace(data, validation_fraction=1e-9), BYTES, silent)
    assert error.value.problems[0].setting == "data.validation_fraction"
    with pytest.raises(UserError, match="all 60 are held out"):
        prepare(replace(data, validation_fraction=1 - 1e-9), BYTES, silent)
    (tmp_path / "nulls.jsonl").write_text('{"text": null}\n' * 3)
    nulls = replace(data, source="jsonl", path=str(tmp_path / "nulls.jsonl"))
    with pytest.raises(UserError, match="all are empty"):
        prepare(nulls, BYTES, silent)


def test_cache_that_cannot_be_created(data: schema.Data, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache="):
        prepare(replace(data, cache=str(tmp_path / "file/cache")), BYTES, silent)


def test_manifest_tells_where_the_data_came_from(data: schema.Data) -> None:
    prepared = prepare(data, BYTES, silent)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["fingerprint"] == prepared.fingerprint
    assert manifest["train"]["num_tokens"] == prepared.train.num_tokens
    assert len(manifest["settings"]["files"]) == 60
    assert manifest["settings"]["files"][0][1] == len(TEXTS[0].encode())
    assert {"tokenizers", "megatron-core", "python"} <= set(manifest["libraries"])


def test_other_python_other_standard_library(data: schema.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from distllm.data import prepare as module

    stdlib = replace(data, source="stdlib", path=None)
    before = [module._document_settings(settings, []) for settings in (stdlib, data)]
    monkeypatch.setattr(sys, "version", "3.99.0")
    after = [module._document_settings(settings, []) for settings in (stdlib, data)]
    assert before[0] != after[0]
    assert before[1] == after[1], "other corpora are not prepared anew for another Python"

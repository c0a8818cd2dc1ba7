"""A pair of token files of another tool: used where it lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, PREPARATION, documents_of, silent

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.preparation.prepare import merge, prepare, prepare_shard
from distllm.data.preparation.prepare_tokenizer import prepare_tokenizer
from distllm.data.preparation.shards import Shard
from distllm.data.prepared import PreparedSource

TEXTS = [f"document {i} " * (i % 5 + 1) for i in range(40)]
END_OF_DOCUMENT = 256  # of the tokenizer of bytes


def write_pair(prefix: Path, token_type: type = np.uint16, sequences: int = 1) -> None:
    """By Megatron's own builder. sequences: of each document."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_type)
    for text in TEXTS:
        tokens = [*text.encode(), END_OF_DOCUMENT]
        lengths = [len(part) for part in np.array_split(tokens, sequences)]
        builder.add_document(np.array(tokens), lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def data(tmp_path: Path) -> schema.Data:
    write_pair(tmp_path / "their.tokens")
    return schema.Data(
        source="megatron",
        path=str(tmp_path / "their.tokens.bin"),
        text_field="text",
        validation_fraction=0.1,
        cache=str(tmp_path / "cache"),
    )


def prepare_one(data: schema.Data, tokenizer: schema.Tokenizer = BYTES) -> PreparedSource:
    (source,) = prepare(data, PREPARATION, tokenizer, silent).sources.values()
    return source


def test_the_last_documents_are_for_validation(data: schema.Data, tmp_path: Path) -> None:
    source = prepare_one(data)
    prefix = tmp_path / "their.tokens"
    lengths = [len(text) + 1 for text in TEXTS]
    assert source.validation
    assert source.train.prefix == source.validation.prefix == prefix
    assert (source.train.first_document, source.train.first_token) == (0, 0)
    assert (source.train.num_documents, source.train.num_tokens) == (36, sum(lengths[:36]))
    assert (source.validation.first_document, source.validation.first_token) == (36, sum(lengths[:36]))
    assert (source.validation.num_documents, source.validation.num_tokens) == (4, sum(lengths[36:]))
    assert source.train.num_bytes is source.validation.num_bytes is None
    assert source.train.max_token == source.validation.max_token == END_OF_DOCUMENT
    assert [file.name for file in source.folder.iterdir()] == ["manifest.json"], "nothing is copied"
    assert prepare_one(data) == source


@pytest.mark.parametrize(("fraction", "num_validation"), [(0.0, None), (1e-9, 1), (0.5, 20), (1 - 1e-9, 39)])
def test_share_of_documents(data: schema.Data, fraction: float, num_validation: int | None) -> None:
    source = prepare_one(replace(data, validation_fraction=fraction))
    assert (source.validation.num_documents if source.validation else None) == num_validation
    assert source.train.num_documents == 40 - (num_validation or 0)


def test_the_tokens_are_ours_of_the_same_text(data: schema.Data, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / f"texts/{i:02}").write_text(text)
    theirs = prepare_one(replace(data, validation_fraction=0.0))
    path = str(tmp_path / "texts/*")
    ours = prepare_one(replace(data, source="text", path=path, validation_fraction=0.0))
    assert documents_of(ours.train.prefix) == documents_of(theirs.train.prefix)
    assert ours.fingerprint == theirs.fingerprint
    for suffix in (".bin", ".idx"):
        assert (
            Path(f"{ours.train.prefix}{suffix}").read_bytes()
            == Path(f"{theirs.train.prefix}{suffix}").read_bytes()
        )
    read = IndexedDataset(str(ours.train.prefix))
    assert [bytes(read[i][:-1].tolist()).decode() for i in range(len(read))] == TEXTS


def test_neither_width_nor_sequences_matter(data: schema.Data, tmp_path: Path) -> None:
    write_pair(tmp_path / "wide", np.int64, sequences=2)
    wide = prepare_one(replace(data, path=str(tmp_path / "wide.bin")))
    narrow = prepare_one(data)
    assert wide.fingerprint == narrow.fingerprint
    assert replace(wide.train, prefix=narrow.train.prefix) == narrow.train


def test_another_tokenizer(data: schema.Data, tmp_path: Path) -> None:
    ids = np.memmap(tmp_path / "their.tokens.bin", np.uint16, "r+")
    ids[0] = 300
    ids.flush()
    with pytest.raises(UserError, match=r"whose largest token id is 300"):
        prepare_one(data)


def test_documents_without_an_end_are_told(data: schema.Data) -> None:
    lines: list[str] = []
    prepare(data, PREPARATION, BYTES, lines.append)
    prepare(data, PREPARATION, replace(BYTES, end_of_document="<|end|>", special_tokens=["x|"]), lines.append)
    assert not any("do not end with" in line for line in lines), "both ends are token 256"
    of_two = replace(BYTES, special_tokens=["<|other|>"])
    tokenizer = prepare_tokenizer(data, PREPARATION, of_two, silent)
    finished = replace(BYTES, kind="huggingface", path=str(tokenizer), end_of_document="<|other|>")
    prepare(data, PREPARATION, finished, lines.append)
    assert any("documents do not end with <|other|>" in line for line in lines)


def test_a_changed_index_is_another_corpus(data: schema.Data, tmp_path: Path) -> None:
    before = prepare_one(data)
    write_pair(tmp_path / "their.tokens", sequences=2)
    after = prepare_one(data)
    assert before.folder != after.folder
    assert before.fingerprint == after.fingerprint


def test_broken_and_empty_pairs(data: schema.Data, tmp_path: Path) -> None:
    with (tmp_path / "their.tokens.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match="must hold"):
        prepare_one(data)


def test_shards_leave_it_to_merge(data: schema.Data) -> None:
    prepare_shard(data, PREPARATION, BYTES, Shard(0, 2), silent)
    assert not list(Path(data.cache).glob("data-*"))
    assert merge(data, PREPARATION, BYTES, silent).sources["megatron"] == prepare_one(data)

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from corpora import documents_of

from distllm.config.problems import UserError
from distllm.data.indexed import TokenWriter
from distllm.data.token_stream import TokenStream, check_vocabulary

DOCUMENTS = [[5, 6, 7, 2], [2], list(range(100, 1, -1)), [299, 2]]


def write(prefix: Path, vocab_size: int, documents: list[list[int]] = DOCUMENTS) -> TokenWriter:
    writer = TokenWriter(prefix, vocab_size)
    for document in documents:
        writer.add(np.array(document, dtype=np.int32))
    writer.finish()
    return writer


@pytest.mark.parametrize(("vocab_size", "token_type"), [(300, "u2"), (65_499, "u2"), (70_000, "i4")])
def test_megatron_reads_what_we_write_and_so_do_we(tmp_path: Path, vocab_size: int, token_type: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [*DOCUMENTS, [vocab_size - 1, 2]]
    writer = write(tmp_path / "x", vocab_size, documents)
    theirs, ours = IndexedDataset(str(tmp_path / "x")), TokenStream(tmp_path / "x")
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert documents_of(tmp_path / "x") == documents
    assert ours.token_type == np.dtype(theirs.index.dtype) == np.dtype(token_type)
    assert (writer.num_documents, writer.num_tokens) == (ours.num_documents, ours.num_tokens) == (5, 108)
    assert writer.max_token == ours.max_token() == vocab_size - 1


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Other tools of Megatron's format put one sequence per sentence."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int64)
    builder.add_document(np.arange(7), [3, 4])
    builder.add_document(np.arange(2), [2])
    builder.finalize(str(tmp_path / "x.idx"))
    assert documents_of(tmp_path / "x") == [[*range(7)], [0, 1]]


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_the_bytes_are_those_of_megatrons_builder(
    tmp_path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    monkeypatch.setattr("distllm.data.indexed.ITEMS_PER_SLICE", 3)  # of which there are several then
    for documents in ([], DOCUMENTS, DOCUMENTS * 2, [[2]] * 9):
        builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=DType.optimal_dtype(vocab_size))
        for document in documents:
            builder.add_document(np.array(document), [len(document)])
        builder.finalize(str(tmp_path / "m.idx"))
        write(tmp_path / "x", vocab_size, documents)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / f"m{suffix}").read_bytes()


def test_digest_follows_the_tokens_not_their_width(tmp_path: Path) -> None:
    narrow, wide = write(tmp_path / "narrow", 300), write(tmp_path / "wide", 70_000)
    assert narrow.sums.digest.hexdigest() == wide.sums.digest.hexdigest()
    other = write(tmp_path / "other", 300, [*DOCUMENTS[:-1], [298, 2]])
    assert other.sums.digest.hexdigest() != narrow.sums.digest.hexdigest()


def test_no_documents(tmp_path: Path) -> None:
    write(tmp_path / "x", 300, [])
    stream = TokenStream(tmp_path / "x")
    assert (stream.num_documents, stream.num_tokens, stream.max_token()) == (0, 0, -1)


def test_tokens_beyond_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "x", 300)
    with pytest.raises(AssertionError, match="token 300 of 300"):
        writer.add(np.array([300]))
    writer.finish()


def test_a_vocabulary_must_belong_to_its_token_file(tmp_path: Path) -> None:
    prefix = tmp_path / "x"
    write(prefix, 300)  # of 16-bit tokens
    check_vocabulary(prefix, 299, 300)
    check_vocabulary(prefix, 299, 65_536)
    with pytest.raises(UserError, match=r"a vocabulary of 299(.|\n)*largest token id is 299"):
        check_vocabulary(prefix, 299, 299)
    with pytest.raises(UserError, match=r"tokenizer.vocab_size=65537(.|\n)*uint16: at most 65536"):
        check_vocabulary(prefix, 299, 65_537)


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must exist"):
        TokenStream(tmp_path / "x")
    write(tmp_path / "x", 300)
    index = tmp_path / "x.idx"
    good = index.read_bytes()
    index.write_bytes(b"not an index " * 20)
    with pytest.raises(UserError, match="must start with the header"):
        TokenStream(tmp_path / "x")
    for changed in (good[:9] + b"\x02" + good[10:], good[:17] + b"\x06" + good[18:]):
        index.write_bytes(changed)
        with pytest.raises(UserError, match="version"):
            TokenStream(tmp_path / "x")

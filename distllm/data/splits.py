"""Training and validation documents: which is which, and their token files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from distllm.config import schema
from distllm.config.problems import user_error
from distllm.data.indexed import TokenWriter
from distllm.data.prepared import Split
from distllm.data.sources import read_documents
from distllm.data.tokenizer import CHARACTERS_PER_BATCH, TextTokenizer, batched

PROGRESS_SECONDS = 5.0

# Of the hash that holds documents out. With another one, old models have been trained on new validation text.
HASH_SEED = 0x5EED_DA7A


def is_held_out(content: bytes, validation_fraction: float) -> bool:
    """Whether a document (UTF-8) is for validation: by its text alone, so equal documents stay together."""
    return xxhash.xxh3_64_intdigest(content, seed=HASH_SEED) < validation_fraction * 2**64


@dataclass(frozen=True)
class Splits:
    """fingerprint: hash of the tokens of both splits and of the size of the vocabulary."""

    train: Split
    validation: Split | None
    fingerprint: str


def write_splits(
    source: schema.Source,
    data: schema.Data,
    files: list[Path],
    tokenizer: TextTokenizer,
    folder: Path,
    report: Callable[[str], None],
) -> Splits:
    """Tokenize `files` into `folder`/train and `folder`/validation, in the order of the documents.

    User errors: those of `read_documents`; no document in a split that must have one.
    """
    train = SplitWriter(folder / "train", tokenizer)
    validation = SplitWriter(folder / "validation", tokenizer) if data.validation_fraction else None
    num_empty = 0
    start = reported = time.monotonic()
    documents = read_documents(source, files)
    for batch in batched(documents, lambda document: len(document.text) + 1, CHARACTERS_PER_BATCH):
        texts = [document.text for document in batch if document.text]
        num_empty += len(batch) - len(texts)
        for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
            content = text.encode()
            held_out = validation and is_held_out(content, data.validation_fraction)
            (validation if validation and held_out else train).add(content, tokens)
        if time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            report(f"tokenized {train.num_bytes / 1e6:,.0f} MB of training text in {reported - start:.0f} s")
    if num_empty:
        report(f"left out {num_empty:,} empty documents")
    _check_counts(data, train.tokens.num_documents, validation.tokens.num_documents if validation else None)
    digests = [writer.tokens.digest.hexdigest() for writer in (train, validation) if writer]
    result = Splits(
        train=train.finish(),
        validation=validation.finish() if validation else None,
        fingerprint=xxhash.xxh3_128_hexdigest(f"{digests} {tokenizer.vocab_size}".encode()),
    )
    report(f"tokenized {len(files):,} files in {time.monotonic() - start:.1f} s")
    return result


def _check_counts(data: schema.Data, num_train: int, num_validation: int | None) -> None:
    if num_train + (num_validation or 0) == 0:
        raise user_error(
            "data.path", data.path, "a document must have text; all are empty", "name other files"
        )
    if num_train == 0:
        rule = f"must leave documents to train on; all {num_validation} are held out"
        raise user_error(
            "data.validation_fraction",
            data.validation_fraction,
            rule,
            "a smaller fraction, 0, or more documents",
        )
    if num_validation == 0:
        rule = f"must hold out a document; of {num_train} it holds out none"
        raise user_error(
            "data.validation_fraction",
            data.validation_fraction,
            rule,
            "a larger fraction, 0, or more documents",
        )


class SplitWriter:
    """Token files of one split, with the sums that the manifest tells."""

    def __init__(self, prefix: Path, tokenizer: TextTokenizer) -> None:
        self.prefix = prefix
        self.num_bytes = 0
        self.tokens = TokenWriter(prefix, tokenizer.vocab_size)
        self._end_of_document = np.array([tokenizer.end_of_document], dtype=np.int32)

    def add(self, content: bytes, tokens: np.ndarray) -> None:
        """Append a document: its text in UTF-8 and its tokens, to which the end of document is added."""
        self.tokens.add(np.concatenate([tokens, self._end_of_document]))
        self.num_bytes += len(content)

    def finish(self) -> Split:
        self.tokens.finish()
        return Split(
            prefix=self.prefix,
            num_documents=self.tokens.num_documents,
            num_tokens=self.tokens.num_tokens,
            num_bytes=self.num_bytes,
            max_token=self.tokens.max_token,
        )

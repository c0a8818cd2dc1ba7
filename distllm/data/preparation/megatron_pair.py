"""A pair of token files that another tool made: nothing is copied; the files are checked once."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.config.data_schema import Source
from distllm.data.indexed import ITEMS_PER_SLICE, TokenSums
from distllm.data.preparation.progress import PROGRESS_SECONDS
from distllm.data.preparation.splits import check_counts, fingerprint
from distllm.data.preparation.token_files import describe
from distllm.data.prepared import Split
from distllm.data.sources import InputFile
from distllm.data.token_stream import TokenStream
from distllm.data.tokenizer import TextTokenizer


def describe_pair(
    source: Source,
    data: schema.Data,
    files: list[InputFile],
    tokenizer: TextTokenizer,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Return the manifest's entries: splits, whose prefixes are absolute, fingerprint and token files.

    files: the one .bin. The last documents are the validation split, at least one if data.validation_fraction
        > 0. User errors: a broken pair; no document in a split that must have one.
    """
    prefix = Path(files[0].path).with_suffix("")
    stream = TokenStream(prefix)
    num_validation = _num_held_out(stream.num_documents, data.validation_fraction)
    num_train = stream.num_documents - num_validation
    check_counts(data, source, num_train, num_validation if data.validation_fraction else None)
    documents = {"train": (0, num_train), "validation": (num_train, stream.num_documents)}
    if not num_validation:
        del documents["validation"]
    end = int(stream.offsets(1, 1)[0])
    if end and stream.read(end - 1, end)[0] != tokenizer.end_of_document:
        report(f"{prefix}.bin: documents do not end with {tokenizer.end_of_document_text}, unlike our own")
    progress = _Progress(stream.num_tokens, report)
    splits, digests = {}, []
    for name, (first, end) in documents.items():
        start, stop = (int(stream.offsets(document, 1)[0]) for document in (first, end))
        sums = _sums(stream, start, stop, progress)
        splits[name] = Split(prefix, end - first, sums.num_tokens, None, sums.max_token, first, start)
        digests.append(sums.digest.hexdigest())
    token_files = describe(prefix.parent, (f"{prefix}.bin", f"{prefix}.idx"))
    return {
        "splits": splits,
        "fingerprint": fingerprint(digests, tokenizer.vocab_size),
        "token_files": token_files,
    }


def index_file(token_file: InputFile) -> Path:
    return Path(token_file.path).with_suffix(".idx")


def _num_held_out(num_documents: int, validation_fraction: float) -> int:
    if not validation_fraction or num_documents < 2:
        return 0
    return min(max(1, round(num_documents * validation_fraction)), num_documents - 1)


def _sums(stream: TokenStream, start: int, stop: int, progress: _Progress) -> TokenSums:
    sums = TokenSums()
    for first in range(start, stop, ITEMS_PER_SLICE):
        part = stream.read(first, min(first + ITEMS_PER_SLICE, stop))
        sums.add(part)
        progress.advance(len(part))
    return sums


class _Progress:
    def __init__(self, num_tokens: int, report: Callable[[str], None]) -> None:
        self._num_tokens = num_tokens
        self._num_done = 0
        self._report = report
        self._reported = time.monotonic()

    def advance(self, num_tokens: int) -> None:
        self._num_done += num_tokens
        if time.monotonic() - self._reported > PROGRESS_SECONDS:
            self._reported = time.monotonic()
            self._report(f"checked {self._num_done:,} of {self._num_tokens:,} tokens")

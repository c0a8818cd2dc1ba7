"""Reads token files in Megatron's indexed format, those that `indexed.py` writes and other tools' alike.

Opening one costs the same for ten documents and for 10**11: only the ends of its parts are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distllm.config.problems import UserError, user_error
from distllm.data.file_array import FileArray
from distllm.data.indexed import HEADER, MAGIC, TOKEN_TYPES

NUM_READ_AHEAD = 512  # offsets of documents that are read at a time: 4 KiB


class TokenStream:
    """The documents of a finished pair of files from `first_document` on, as one stream of tokens.

    Documents and tokens are counted from 0 at the beginning of the range.
    """

    def __init__(self, prefix: Path, first_document: int = 0, num_documents: int | None = None) -> None:
        self.prefix = prefix
        index_file, token_file = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for file in (index_file, token_file):
            if not file.is_file():
                raise _broken(file, "must exist")
        with index_file.open("rb") as opened:
            header = opened.read(HEADER.size)
        if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
            raise _broken(index_file, "must start with the header of Megatron's indexed format")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
        if version != 1 or code not in TOKEN_TYPES:
            raise _broken(
                index_file, f"must be of version 1 and hold integers; version {version}, type {code}"
            )
        if index_file.stat().st_size < HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8:
            raise _broken(index_file, f"must list {num_sequences} sequences, but ends before")
        self.token_type: np.dtype[Any] = np.dtype(TOKEN_TYPES[code])
        lengths = FileArray(index_file, np.int32, HEADER.size, num_sequences)
        self._byte_offsets = FileArray(index_file, np.int64, HEADER.size + num_sequences * 4, num_sequences)
        # The first sequence of each document, and the number of sequences.
        self._boundaries = FileArray(
            index_file, np.int64, HEADER.size + num_sequences * (4 + 8), num_boundaries
        )
        num_bytes = 0
        if num_sequences:
            last = num_sequences - 1
            num_bytes = self._byte_offsets.at(last) + lengths.at(last) * self.token_type.itemsize
        if token_file.stat().st_size != num_bytes:
            width = self.token_type.itemsize
            rule = f"must hold {num_bytes // width} tokens of {width} bytes as its .idx says"
            raise _broken(token_file, f"{rule}; it has {token_file.stat().st_size} bytes")
        self._num_sequences = num_sequences
        self._num_file_tokens = num_bytes // self.token_type.itemsize
        self._tokens = FileArray(token_file, self.token_type)

        all_documents = max(0, num_boundaries - 1)
        self._first_document = first_document
        self.num_documents = all_documents - first_document if num_documents is None else num_documents
        assert first_document + self.num_documents <= all_documents, f"{prefix} has {all_documents} documents"
        self._first_token = self._file_offsets(0, 1)[0].item() if self.num_documents else 0
        self.num_tokens = int(self._file_offsets(self.num_documents, 1)[0]) - self._first_token

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens start to stop - 1, in the file's integer type."""
        return self._tokens.read(self._first_token + start, self._first_token + stop)

    def offsets(self, first: int, count: int) -> np.ndarray:
        """Return int64 [count]: first tokens of documents first on; num_tokens for document num_documents."""
        return self._file_offsets(first, count) - self._first_token

    def document_at(self, token: int) -> int:
        """Return the document that holds a token."""
        assert 0 <= token < self.num_tokens, f"token {token} of {self.num_tokens}"
        low, high = 0, self.num_documents  # offset(low) <= token < offset(high)
        while high - low > 1:
            middle = (low + high) // 2
            if int(self.offsets(middle, 1)[0]) <= token:
                low = middle
            else:
                high = middle
        return low

    def starts_between(self, start: int, stop: int) -> np.ndarray:
        """Return int64: the first tokens of documents that begin within start to stop - 1."""
        found = []
        document = self.document_at(start)
        while document < self.num_documents:
            count = min(NUM_READ_AHEAD, self.num_documents - document)
            offsets = self.offsets(document, count)
            found.append(offsets[(offsets >= start) & (offsets < stop)])
            if offsets[-1] >= stop:
                break
            document += count
        # Of documents without tokens, which other tools may write, only the last at a place counts.
        return np.unique(np.concatenate(found))

    def max_token(self) -> int:
        """Return the largest token id, -1 without tokens; reads the whole range."""
        step = 1 << 24
        return max(
            (
                int(self.read(i, min(i + step, self.num_tokens)).max())
                for i in range(0, self.num_tokens, step)
            ),
            default=-1,
        )

    def _file_offsets(self, first: int, count: int) -> np.ndarray:
        """Return int64 [count]: the first tokens of documents, counted in the whole file."""
        first += self._first_document
        sequences = self._boundaries.read(first, first + count)
        if not len(sequences) or sequences[-1] - sequences[0] != count - 1:
            return np.array([self._sequence_offset(int(sequence)) for sequence in sequences], np.int64)
        # Every document is one sequence, as almost always: one read for all.
        start, stop = int(sequences[0]), min(int(sequences[-1]) + 1, self._num_sequences)
        offsets = self._byte_offsets.read(start, stop) // self.token_type.itemsize
        return offsets if len(offsets) == count else np.append(offsets, self._num_file_tokens)

    def _sequence_offset(self, sequence: int) -> int:
        if sequence == self._num_sequences:
            return self._num_file_tokens
        return self._byte_offsets.at(sequence) // self.token_type.itemsize


def check_vocabulary(prefix: Path, max_token: int, vocab_size: int) -> None:
    """Check that the tokenizer and the token file `prefix` belong together.

    User error: ids beyond the vocabulary, or a vocabulary beyond the ids that the file's token type can hold.
    """
    if max_token >= vocab_size:
        raise user_error(
            "tokenizer.path",
            f"a vocabulary of {vocab_size}",
            f"must be the tokenizer that made {prefix}.bin, whose largest token id is {max_token}",
            "name that tokenizer, or prepare the data again with this one",
        )
    token_type = TokenStream(prefix).token_type
    largest = int(np.iinfo(token_type).max)
    if vocab_size > largest + 1:
        raise user_error(
            "tokenizer.vocab_size",
            vocab_size,
            f"must fit the token type of {prefix}.bin, {token_type}: at most {largest + 1}",
            "a smaller vocabulary, or remove the folder, and it is prepared again",
        )


def _broken(file: Path, rule: str) -> UserError:
    return user_error("data.cache", file, rule, "remove its folder, and it is prepared again")

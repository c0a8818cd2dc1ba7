"""Token files in Megatron's indexed format: `PREFIX.bin` holds the tokens, `PREFIX.idx` the documents.

The index: a header, the length of each sequence (int32), the byte where it begins (int64), and the first
sequence of each document (int64; one more than there are documents). Each of our documents is one sequence.

Written without Megatron Core, byte for byte as its builder does: its import takes seconds, and it holds all
lengths in memory. `token_stream.py` reads the files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, documents + 1
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SMALLEST_WIDE_VOCABULARY = 65_500  # Megatron's own limit
ITEMS_PER_SLICE = 1 << 20


def token_type(vocab_size: int) -> np.dtype:
    """Return the type in which Megatron stores the tokens of a vocabulary of this size, and so do we."""
    return np.dtype("<u2" if vocab_size < SMALLEST_WIDE_VOCABULARY else "<i4")


class TokenSums:
    """Running totals of the tokens written. digest: of all of them, whatever width they are stored in."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.max_token = -1
        self.digest = xxhash.xxh3_128()

    def add(self, tokens: np.ndarray) -> None:
        for start in range(0, len(tokens), ITEMS_PER_SLICE):
            part = tokens[start : start + ITEMS_PER_SLICE]
            self.max_token = max(self.max_token, int(part.max()))
            self.digest.update(np.ascontiguousarray(part, dtype="<i4").data)
        self.num_tokens += len(tokens)


class TokenWriter:
    """Writes documents one after the other, in memory that does not grow with their number.

    Nothing is readable before `finish`.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.num_documents = 0
        self.sums = TokenSums()
        self._type = token_type(vocab_size)
        self._tokens = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115  # `finish` closes it
        self._index = Path(f"{prefix}.idx").open("w+b")  # noqa: SIM115  # `finish` closes it
        self._index.write(bytes(HEADER.size))  # holds numbers that only `finish` knows; the lengths follow it

    @property
    def num_tokens(self) -> int:
        return self.sums.num_tokens

    @property
    def max_token(self) -> int:
        return self.sums.max_token

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, int [num_tokens], its end-of-document token included."""
        self.append(tokens, np.array([len(tokens)]))

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: the tokens of all of them, and the length of each, int [num_documents]."""
        assert lengths.min(initial=1) > 0, "a document has its end-of-document token at least"
        assert lengths.sum() == len(tokens), "the tokens are those of the documents"
        self.sums.add(tokens)
        # A wider token would be truncated silently to the width of the file.
        assert self.max_token < self.vocab_size, f"token {self.max_token} of {self.vocab_size}"
        self._tokens.write(np.ascontiguousarray(tokens, dtype=self._type).data)
        self._index.write(lengths.astype("<i4").data)
        self.num_documents += len(lengths)

    def finish(self) -> None:
        self._tokens.close()
        with self._index as index:
            for offset, lengths in self._slices_of_lengths():
                num_bytes = lengths.astype("<i8") * self._type.itemsize
                ends = offset + np.cumsum(num_bytes)
                index.write((ends - num_bytes).data)
            for start in range(0, self.num_documents + 1, ITEMS_PER_SLICE):
                stop = min(start + ITEMS_PER_SLICE, self.num_documents + 1)
                index.write(np.arange(start, stop, dtype="<i8").data)
            index.seek(0)
            (code,) = (code for code, known in TOKEN_TYPES.items() if self._type == known)
            index.write(HEADER.pack(MAGIC, VERSION, code, self.num_documents, self.num_documents + 1))

    def _slices_of_lengths(self) -> Iterator[tuple[int, np.ndarray]]:
        """Read the written lengths again in parts, each with the byte where its first document begins.

        Leaves the index at its end, whatever is written meanwhile.
        """
        offset = 0
        for start in range(0, self.num_documents, ITEMS_PER_SLICE):
            self._index.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(
                self._index.read(4 * min(ITEMS_PER_SLICE, self.num_documents - start)), "<i4"
            )
            self._index.seek(0, 2)
            yield offset, lengths
            offset += int(lengths.sum(dtype=np.int64)) * self._type.itemsize

"""Reads token files in Megatron's indexed format, those that `indexed.py` writes and other tools' alike.

Read without Megatron Core: its import takes seconds, and a reader needs thirty lines.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distllm.config.problems import UserError, user_error
from distllm.data.indexed import HEADER, MAGIC, TOKEN_TYPES


class TokenStream:
    """A finished pair of files, memory-mapped read-only.

    tokens: [num_tokens], of the width of the file. document_offsets: int64 [num_documents + 1], the first
    token of each document, and the end.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index_file, token_file = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for file in (index_file, token_file):
            if not file.is_file():
                raise _broken(file, "must exist")
        index = np.memmap(index_file, mode="r") if index_file.stat().st_size else np.empty(0, np.uint8)
        if len(index) < HEADER.size or bytes(index[: len(MAGIC)]) != MAGIC:
            raise _broken(index_file, "must start with the header of Megatron's indexed format")
        _, version, code, num_sequences, num_boundaries = HEADER.unpack(bytes(index[: HEADER.size]))
        if version != 1 or code not in TOKEN_TYPES:
            raise _broken(
                index_file, f"must be of version 1 and hold integers; version {version}, type {code}"
            )
        if len(index) < HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8:
            raise _broken(index_file, f"must list {num_sequences} sequences, but ends before")

        lengths = np.frombuffer(index, np.int32, num_sequences, HEADER.size)
        # Between them stand the byte offsets of the sequences, which follow from the lengths.
        boundaries = np.frombuffer(index, np.int64, num_boundaries, HEADER.size + num_sequences * (4 + 8))
        sequence_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.document_offsets: np.ndarray = sequence_offsets[boundaries]
        num_tokens = int(sequence_offsets[-1])

        token_type = np.dtype(TOKEN_TYPES[code])
        if token_file.stat().st_size != num_tokens * token_type.itemsize:
            rule = f"must hold {num_tokens} tokens of {token_type.itemsize} bytes as its .idx says"
            raise _broken(token_file, f"{rule}; it has {token_file.stat().st_size} bytes")
        # An empty file cannot be mapped.
        self.tokens: np.ndarray = (
            np.memmap(token_file, token_type, "r") if num_tokens else np.empty(0, token_type)
        )

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def max_token(self) -> int:
        """The largest token id, -1 without tokens; reads the whole file."""
        step = 1 << 24
        return max(
            (int(self.tokens[i : i + step].max()) for i in range(0, self.num_tokens, step)), default=-1
        )


def check_vocabulary(prefix: Path, max_token: int, vocab_size: int) -> None:
    """User error if the tokenizer and the token file `prefix` do not belong together: ids beyond the
    vocabulary, or a vocabulary beyond the ids that the file's token type can hold."""
    if max_token >= vocab_size:
        raise user_error(
            "tokenizer.path",
            f"a vocabulary of {vocab_size}",
            f"must be the tokenizer that made {prefix}.bin, whose largest token id is {max_token}",
            "name that tokenizer, or prepare the data anew with this one",
        )
    token_type = TokenStream(prefix).tokens.dtype
    if vocab_size > np.iinfo(token_type).max + 1:
        raise user_error(
            "tokenizer.vocab_size",
            vocab_size,
            f"must fit the token type of {prefix}.bin, {token_type}: at most {np.iinfo(token_type).max + 1}",
            "a smaller vocabulary, or remove the folder, and it is prepared anew",
        )


def _broken(file: Path, rule: str) -> UserError:
    return user_error("data.cache", file, rule, "remove its folder, and it is prepared anew")

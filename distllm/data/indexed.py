"""Token files in Megatron's indexed format: `PREFIX.bin` holds the tokens, `PREFIX.idx` the documents.

The format and its writer; `token_stream.py` reads it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import xxhash

HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the token type, sequences, documents + 1
MAGIC = b"MMIDIDX\x00\x00"
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class TokenWriter:
    """Writes documents one after the other; nothing is readable before `finish`.

    digest: of all tokens, independent of the width they are stored in.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.vocab_size = vocab_size
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token = -1
        self.digest = xxhash.xxh3_128()
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, int [num_tokens], its end-of-document token included."""
        assert len(tokens) > 0, "a document has its end-of-document token at least"
        tokens = tokens.astype("<i4", copy=False)
        self.num_documents += 1
        self.num_tokens += len(tokens)
        self.max_token = max(self.max_token, int(tokens.max()))
        # A wider token would be cut to the width of the file without a word.
        assert self.max_token < self.vocab_size, f"token {self.max_token} of {self.vocab_size}"
        self.digest.update(tokens.tobytes())
        self._builder.add_document(tokens, [len(tokens)])

    def finish(self) -> None:
        self._builder.finalize(f"{self.prefix}.idx")

"""Training and validation documents: which is which, and the files of each side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from distllm.config import schema
from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.indexed import TokenWriter
from distllm.data.prepared import Split

# Salt of the hash that holds documents out. With another one, a model trained before would have seen
# documents of the new validation split.
HASH_SEED = 0x5EED_DA7A

# Where a document came from: index of its file in files.json, and its row in that file, from 0.
ORIGIN = np.dtype([("file", "<u4"), ("row", "<u8")])


def is_held_out(content: bytes, validation_fraction: float) -> bool:
    """Return whether a document (UTF-8) is for validation.

    This depends on its text alone, so that equal documents are in the same split.
    """
    return xxhash.xxh3_64_intdigest(content, seed=HASH_SEED) < validation_fraction * 2**64


def split_names(validation_fraction: float) -> tuple[str, ...]:
    return ("train", "validation") if validation_fraction else ("train",)


class SplitWriter:
    """Writes the token files of one split and `PREFIX.origins`, and collects the totals for the manifest."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.num_bytes = 0
        self.tokens = TokenWriter(prefix, vocab_size)
        self._origins = Path(f"{prefix}.origins").open("wb")  # noqa: SIM115  # `finish` closes it

    def append(self, tokens: np.ndarray, lengths: np.ndarray, origins: np.ndarray, num_bytes: int) -> None:
        """Append documents: the tokens of all of them, ends included; of each its length and its origin.

        num_bytes: of the text of all of them, in UTF-8.
        """
        assert len(lengths) == len(origins), "every document has a length and an origin"
        self.tokens.append(tokens, lengths)
        self._origins.write(origins.astype(ORIGIN, copy=False).tobytes())
        self.num_bytes += num_bytes

    def finish(self) -> Split:
        self.tokens.finish()
        self._origins.close()
        return Split(
            prefix=self.prefix,
            num_documents=self.tokens.num_documents,
            num_tokens=self.tokens.num_tokens,
            num_bytes=self.num_bytes,
            max_token=self.tokens.max_token,
        )


def fingerprint(digests: Sequence[str], vocab_size: int) -> str:
    """Hash the tokens of the splits, given by their digests, and the size of the vocabulary."""
    return xxhash.xxh3_128_hexdigest(f"{list(digests)} {vocab_size}".encode())


def check_counts(data: schema.Data, source: Source, num_train: int, num_validation: int | None) -> None:
    """Check that each split that must have documents has one; else a user error."""
    if num_train + (num_validation or 0) == 0:
        rule, fix = "a document must have text that can be used; none has", "name other files"
        raise user_error("data.path", source.path, rule, fix)
    if num_train == 0:
        rule = f"must leave documents to train on; all {num_validation} are held out"
        fix = "a smaller fraction, 0, or more documents"
        raise user_error("data.validation_fraction", data.validation_fraction, rule, fix)
    if num_validation == 0:
        rule = f"must hold out a document; of {num_train} it holds out none"
        fix = "a larger fraction, 0, or more documents"
        raise user_error("data.validation_fraction", data.validation_fraction, rule, fix)

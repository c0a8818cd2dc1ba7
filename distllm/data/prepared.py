"""The result of preparation: the token files of every source of a job, and their description."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Split:
    """A range of the documents of one pair of token files.

    prefix: of the files.
    num_tokens: including one end-of-document token per document.
    num_bytes: UTF-8 of the text, None where only the tokens are known.
    max_token: the largest token id.
    first_document, first_token: where the range begins in the files; not 0 only in files of another tool.
    """

    prefix: Path
    num_documents: int
    num_tokens: int
    num_bytes: int | None
    max_token: int
    first_document: int = 0
    first_token: int = 0


@dataclass(frozen=True)
class PreparedSource:
    """One prepared source.

    folder: of the prepared corpus; beside the token files it holds manifest.json, files.json and
        quarantine.jsonl, and `train.origins` and `validation.origins`: where each document came from.
    fingerprint: hash of the tokens of both splits and of the size of the vocabulary.
    num_quarantined: rows and files that could not be used.
    """

    name: str
    folder: Path
    train: Split
    validation: Split | None
    fingerprint: str
    num_quarantined: int = 0


@dataclass(frozen=True)
class PreparedData:
    """The prepared sources of a job.

    sources: by name, in the order of the config. vocab_size: tokens, special ones included.
    end_of_document: token id.
    """

    tokenizer_folder: Path
    vocab_size: int
    end_of_document: int
    sources: dict[str, PreparedSource]

    @property
    def has_validation(self) -> bool:
        return any(source.validation for source in self.sources.values())

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: source.fingerprint for name, source in self.sources.items()}

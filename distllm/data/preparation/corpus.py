"""One source of a job and the folder that it is prepared into."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.cache import MANIFEST, digest
from distllm.data.preparation import quarantine
from distllm.data.preparation.cache_key import FORMAT_VERSION, cache_folder, document_settings, libraries
from distllm.data.preparation.join import absolute_entry, join
from distllm.data.preparation.megatron_pair import describe_pair, index_file
from distllm.data.preparation.pieces import Work
from distllm.data.preparation.quarantine import BadInputError
from distllm.data.preparation.splits import check_counts
from distllm.data.preparation.token_files import describe
from distllm.data.preparation.units import unit_bytes_of
from distllm.data.preparation.workers import make_pieces
from distllm.data.prepared import Split
from distllm.data.sources import InputFile, kind_of, list_files, plan_units
from distllm.data.sources.files import input_file
from distllm.data.tokenizer import TextTokenizer

Report = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """One source of a job, with the folder of its prepared corpus.

    files: of the source, as they are now. settings: all that determines the content of `folder`.
    unit_bytes: size of a unit; None derives it from the size of the corpus.
    """

    name: str
    source: Source
    data: schema.Data
    preparation: schema.Preparation
    tokenizer: TextTokenizer
    tokenizer_folder: Path
    files: list[InputFile]
    settings: dict[str, Any]
    unit_bytes: int | None

    @classmethod
    def find(
        cls,
        name: str,
        data: schema.Data,
        preparation: schema.Preparation,
        tokenizer: TextTokenizer,
        tokenizer_folder: Path,
        unit_bytes: int | None = None,
    ) -> Corpus:
        """List the files of a source and find its folder. User errors: those of `list_files`."""
        source = data.named_sources[name]
        files = list_files(source)
        if kind_of(source).is_tokenized:
            files = [*files, input_file(index_file(files[0]))]
        settings = {
            "format": FORMAT_VERSION,
            **document_settings(source, data, preparation, files),
            "tokenizer": digest((tokenizer_folder / "tokenizer.json").read_bytes()),
            "end_of_document": tokenizer.end_of_document_text,
        }
        return cls(name, source, data, preparation, tokenizer, tokenizer_folder, files, settings, unit_bytes)

    @property
    def folder(self) -> Path:
        return cache_folder(self.data, "data", self.settings)

    @property
    def is_prepared(self) -> bool:
        return (self.folder / MANIFEST).exists()

    @property
    def is_tokenized(self) -> bool:
        """Return whether another tool has tokenized the source."""
        return kind_of(self.source).is_tokenized

    @property
    def pieces(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.pieces")

    def work(self, label: str = "all") -> Work:
        """Cut the corpus into units. label: see `Work`. User errors: those of `plan_units`."""
        return Work(
            source=self.source,
            files=self.files,
            units=plan_units(self.source, self.files, self.unit_bytes or unit_bytes_of(self.files)),
            folder=self.pieces,
            tokenizer_folder=self.tokenizer_folder,
            end_of_document=self.tokenizer.end_of_document_text,
            validation_fraction=self.data.validation_fraction,
            max_document_bytes=self.preparation.max_document_bytes,
            stops=self.preparation.bad_input == "stop",
            label=label,
        )

    def make_pieces(self, work: Work, indices: range, report: Report) -> None:
        """Make pieces. User errors: those of `workers.make_pieces`; a rejected row, if it stops the job."""
        try:
            make_pieces(work, indices, self.preparation.workers, self.tokenizer, report)
        except BadInputError as error:
            raise quarantine.stopped(absolute_entry(work, error)) from None

    def build(self, folder: Path, report: Report) -> dict[str, Any]:
        """Fill `folder`, and describe it for the manifest; continues the work of a killed process."""
        start = time.monotonic()
        if self.is_tokenized:
            facts = describe_pair(self.source, self.data, self.files, self.tokenizer, report)
            self._check_unchanged()
        else:
            work = self.work()
            self.make_pieces(work, range(len(work.units)), report)
            facts = self._join(work, folder, report)
        seconds = time.monotonic() - start
        done = "checked" if self.is_tokenized else "tokenized"
        report(f"{done} {len(self.files):,} files in {seconds:.1f} s")
        splits = facts.pop("splits")
        return {
            "train": _plain(splits["train"]),
            "validation": _plain(splits["validation"]) if "validation" in splits else None,
            "vocab_size": self.tokenizer.vocab_size,
            "end_of_document": self.tokenizer.end_of_document,
            **facts,
            "settings": self.settings,
            "libraries": libraries(),
            "seconds": round(seconds, 3),
        }

    def _join(self, work: Work, folder: Path, report: Report) -> dict[str, Any]:
        joined = join(work, folder, self.tokenizer.vocab_size, report)
        if joined.rejected:
            report(quarantine.summary(joined.rejected, joined.num_rejected_files, self.folder))
        validation = joined.splits.get("validation")
        num_validation = validation.num_documents if validation else None
        try:
            check_counts(self.data, self.source, joined.splits["train"].num_documents, num_validation)
            self._check_unchanged()
        except ValueError:
            shutil.rmtree(self.pieces)  # useless: the fix gives the corpus another key
            raise
        names = [f"{name}{suffix}" for name in joined.splits for suffix in (".bin", ".idx", ".origins")]
        return {
            # Relative, since the folder is renamed.
            "splits": {name: replace(split, prefix=Path(name)) for name, split in joined.splits.items()},
            "fingerprint": joined.fingerprint,
            "rejected": joined.rejected,
            "token_files": describe(folder, names),
        }

    def _check_unchanged(self) -> None:
        """Check that no file has changed since the start. User error: else the key would not match the
        content."""
        if changed := kind_of(self.source).changed_file(self.source, self.files):
            rule = f"no file may change while it is read; {changed.path} has"
            raise user_error("data.path", self.source.path, rule, "run it again when no program writes there")


def _plain(split: Split) -> dict[str, Any]:
    return {**asdict(split), "prefix": str(split.prefix)}

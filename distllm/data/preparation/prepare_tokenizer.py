"""The tokenizer of a job: a finished one, or one in the cache, which is trained if it is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.config.data_schema import Source
from distllm.config.problems import user_error
from distllm.data.cache import build_once
from distllm.data.preparation.cache_key import FORMAT_VERSION, cache_folder, document_settings, libraries
from distllm.data.preparation.splits import is_held_out
from distllm.data.preparation.units import unit_bytes_of
from distllm.data.sources import Document, InputFile, kind_of, list_files, plan_units, read_unit
from distllm.data.tokenizer import TextTokenizer
from distllm.data.tokenizer_training import byte_tokenizer, train_bpe

Report = Callable[[str], None]


def prepare_tokenizer(
    data: schema.Data, preparation: schema.Preparation, tokenizer: schema.Tokenizer, report: Report
) -> Path:
    """Return the folder of the tokenizer: `tokenizer.path`, or one in the cache, trained if it is missing.

    User errors: those of loading and of training; `tokenizer.vocab_size` unlike that of a finished tokenizer.
    """
    if tokenizer.path is not None:
        folder = Path(tokenizer.path).expanduser().absolute()
        check_finished(TextTokenizer.load(folder, tokenizer.end_of_document), tokenizer)
        return folder
    if tokenizer.kind == "huggingface":
        raise user_error("tokenizer.path", None, "must name the tokenizer's folder", "tokenizer.path=FOLDER")
    trained = tokenizer.kind == "bpe"
    sources = [source for source in data.named_sources.values() if not kind_of(source).is_tokenized]
    corpora = [(source, list_files(source)) for source in sources] if trained else []
    settings: dict[str, Any] = {"format": FORMAT_VERSION, "tokenizer": asdict(tokenizer)}
    if trained:
        settings["documents"] = [
            document_settings(source, data, preparation, files) for source, files in corpora
        ]

    def build(folder: Path) -> dict[str, Any]:
        if trained:
            made = _train(_training_texts(data, preparation, corpora), tokenizer, report)
        else:
            made = byte_tokenizer(tokenizer.special_tokens, tokenizer.end_of_document)
            check_finished(made, tokenizer)
        made.save(folder)
        return {"vocab_size": made.vocab_size, "settings": settings, "libraries": libraries()}

    folder = cache_folder(data, "tokenizer", settings)
    build_once(folder, build, report)
    return folder


def _training_texts(
    data: schema.Data, preparation: schema.Preparation, corpora: list[tuple[Source, list[InputFile]]]
) -> Iterator[str]:
    for source, files in corpora:
        for unit in plan_units(source, files, unit_bytes_of(files)):
            for item in read_unit(source, files, unit, preparation.max_document_bytes):
                if isinstance(item, Document) and not is_held_out(
                    item.text.encode(), data.validation_fraction
                ):
                    yield item.text


def _train(texts: Iterator[str], tokenizer: schema.Tokenizer, report: Report) -> TextTokenizer:
    vocab_size = tokenizer.vocab_size
    if vocab_size is None:
        rule = "must be the size to train to"
        raise user_error("tokenizer.vocab_size", None, rule, "tokenizer.vocab_size=8192")
    start = time.monotonic()
    made = train_bpe(texts, vocab_size, tokenizer.special_tokens, tokenizer.end_of_document)
    report(f"trained a tokenizer of {made.vocab_size:,} tokens in {time.monotonic() - start:.1f} s")
    if made.vocab_size < vocab_size:
        report(f"the documents are too few for the {vocab_size:,} tokens of tokenizer.vocab_size")
    return made


def check_finished(finished: TextTokenizer, tokenizer: schema.Tokenizer) -> None:
    """Check the settings against a finished tokenizer, whose size and special tokens are fixed."""
    if tokenizer.vocab_size not in (None, finished.vocab_size):
        rule = f"must be the size of the finished tokenizer, {finished.vocab_size}"
        fix = f"tokenizer.vocab_size=null or {finished.vocab_size}"
        raise user_error("tokenizer.vocab_size", tokenizer.vocab_size, rule, fix)
    vocabulary = finished.library_tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in tokenizer.special_tokens if token not in vocabulary]
    if missing:
        rule = f"must be in the finished tokenizer's vocabulary, which lacks {missing}"
        raise user_error(
            "tokenizer.special_tokens", tokenizer.special_tokens, rule, "tokenizer.special_tokens=[]"
        )

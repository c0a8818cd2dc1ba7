"""From documents to token files: once, then from the cache, however many ranks ask.

`data.cache` holds one folder per prepared corpus and one per tokenizer that was made for it, named by a key
of all that decides the content. Inputs enter the key by path, size and time of change: to hash terabytes at
each start would take hours. What comes out is hashed while it is written: the `fingerprint` is the same
wherever the text, the tokenizer and the split are the same.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.config.problems import user_error
from distllm.data.cache import build_once, digest
from distllm.data.prepared import PreparedData, PreparedSource, Split
from distllm.data.sources import read_documents, source_files
from distllm.data.splits import is_held_out, write_splits
from distllm.data.token_stream import check_vocabulary
from distllm.data.tokenizer import TextTokenizer
from distllm.data.tokenizer_training import byte_tokenizer, train_bpe

FORMAT_VERSION = 1  # raise it when the same settings and inputs come to give other files

Report = Callable[[str], None]


def prepare(
    data: schema.Data, preparation: schema.Preparation, tokenizer: schema.Tokenizer, report: Report
) -> PreparedData:
    """Token files of all sources of `data`, from the cache or made now. Every rank may call it; it needs no
    process group.

    report: gets progress, a line at a time. User errors: those of the sources and of the tokenizer; no
    document for training, or none for validation though data.validation_fraction > 0.
    """
    tokenizer_folder = prepare_tokenizer(data, preparation, tokenizer, report)
    text_tokenizer = TextTokenizer.load(tokenizer_folder, tokenizer.end_of_document)
    sources = {
        name: prepare_source(name, source, data, preparation, text_tokenizer, tokenizer_folder, report)
        for name, source in data.named_sources.items()
    }
    return PreparedData(tokenizer_folder, text_tokenizer.vocab_size, text_tokenizer.end_of_document, sources)


def prepare_source(
    name: str,
    source: schema.Source,
    data: schema.Data,
    preparation: schema.Preparation,
    text_tokenizer: TextTokenizer,
    tokenizer_folder: Path,
    report: Report,
) -> PreparedSource:
    files = source_files(source)
    settings = {
        "format": FORMAT_VERSION,
        **_document_settings(source, data, files),
        "tokenizer": digest((tokenizer_folder / "tokenizer.json").read_bytes()),
        "end_of_document": text_tokenizer.end_of_document_text,
    }

    def build(folder: Path) -> dict[str, Any]:
        splits = asdict(write_splits(source, data, files, text_tokenizer, folder, report))
        for split_name in ("train", "validation"):
            if splits[split_name]:
                splits[split_name]["prefix"] = split_name  # relative, for the folder is renamed
        sizes = {"vocab_size": text_tokenizer.vocab_size, "end_of_document": text_tokenizer.end_of_document}
        return {**splits, **sizes, "settings": settings, "libraries": _libraries()}

    folder = _cache_folder(data, "data", settings)
    manifest = build_once(folder, build, report)

    def split(split_name: str) -> Split:
        return Split(**manifest[split_name] | {"prefix": folder / split_name})

    prepared = PreparedSource(
        name,
        folder,
        train=split("train"),
        validation=split("validation") if manifest["validation"] else None,
        fingerprint=manifest["fingerprint"],
    )
    for part in filter(None, (prepared.train, prepared.validation)):
        check_vocabulary(part.prefix, part.max_token, text_tokenizer.vocab_size)
    report(_summary(prepared))
    return prepared


def prepare_tokenizer(
    data: schema.Data, preparation: schema.Preparation, tokenizer: schema.Tokenizer, report: Report
) -> Path:
    """The folder of the tokenizer: `tokenizer.path`, or one in the cache, which is trained if it must be.

    User errors: those of loading and of training; `tokenizer.vocab_size` unlike that of a finished tokenizer.
    """
    if tokenizer.path is not None:
        folder = Path(tokenizer.path).expanduser().absolute()
        check_finished(TextTokenizer.load(folder, tokenizer.end_of_document), tokenizer)
        return folder
    if tokenizer.kind == "huggingface":
        raise user_error("tokenizer.path", None, "must name the tokenizer's folder", "tokenizer.path=FOLDER")
    trained = tokenizer.kind == "bpe"
    files = {name: source_files(source) for name, source in data.named_sources.items()} if trained else {}
    settings: dict[str, Any] = {"format": FORMAT_VERSION, "tokenizer": asdict(tokenizer)}
    if trained:
        settings["documents"] = [
            _document_settings(source, data, files[name]) for name, source in data.named_sources.items()
        ]

    def build(folder: Path) -> dict[str, Any]:
        if trained:
            made = _train(data, files, tokenizer, report)
        else:
            made = byte_tokenizer(tokenizer.special_tokens, tokenizer.end_of_document)
            check_finished(made, tokenizer)
        made.save(folder)
        return {"vocab_size": made.vocab_size, "settings": settings, "libraries": _libraries()}

    folder = _cache_folder(data, "tokenizer", settings)
    build_once(folder, build, report)
    return folder


def _train(
    data: schema.Data, files: dict[str, list[Path]], tokenizer: schema.Tokenizer, report: Report
) -> TextTokenizer:
    """A BPE of the training documents of all sources."""
    vocab_size = tokenizer.vocab_size
    if vocab_size is None:
        raise user_error(
            "tokenizer.vocab_size", None, "must be the size to train to", "tokenizer.vocab_size=8192"
        )
    start = time.monotonic()
    texts = (
        document.text
        for name, source in data.named_sources.items()
        for document in read_documents(source, files[name])
    )
    training_texts = (text for text in texts if not is_held_out(text.encode(), data.validation_fraction))
    made = train_bpe(training_texts, vocab_size, tokenizer.special_tokens, tokenizer.end_of_document)
    report(f"trained a tokenizer of {made.vocab_size:,} tokens in {time.monotonic() - start:.1f} s")
    if made.vocab_size < vocab_size:
        report(f"the documents are too few for the {vocab_size:,} tokens of tokenizer.vocab_size")
    return made


def check_finished(finished: TextTokenizer, tokenizer: schema.Tokenizer) -> None:
    """A tokenizer that is not trained has its size and its special tokens already."""
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


def _cache_folder(data: schema.Data, kind: str, settings: dict[str, Any]) -> Path:
    key = digest(json.dumps(settings, sort_keys=True).encode())
    return Path(data.cache).expanduser().absolute() / f"{kind}-{key}"


def _document_settings(source: schema.Source, data: schema.Data, files: list[Path]) -> dict[str, Any]:
    """What decides which documents there are and on which side each falls."""
    described = [(str(file), file.stat()) for file in files]
    return {
        "source": source.source,
        "text_field": source.text_field if source.source in ("jsonl", "parquet") else None,
        "validation_fraction": data.validation_fraction,
        "python": sys.version if source.source == "stdlib" else None,
        "files": [[path, status.st_size, status.st_mtime_ns] for path, status in described],
    }


def _libraries() -> dict[str, str]:
    """For the reader of the manifest; not part of the key, or each upgrade would train other tokenizers."""
    names = ("tokenizers", "datasets", "numpy", "megatron-core")
    return {"python": sys.version, **{name: version(name) for name in names}}


def _summary(prepared: PreparedSource) -> str:
    splits = [("train", prepared.train), ("validation", prepared.validation)]
    counts = [
        f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, {split.num_bytes:,} bytes"
        for name, split in splits
        if split
    ]
    return "; ".join(counts)

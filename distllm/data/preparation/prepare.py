"""From documents to token files: once, then from the cache, however many ranks ask.

`data.cache` holds one folder per prepared source and one per tokenizer that was made for it, named by a key
of all that determines the content (`cache_key.py`). A source is cut into units. Each becomes a piece
(`pieces.py`) that some process makes (`workers.py`), here or for a shard, and the pieces are joined
(`join.py`). The result is hashed while it is written: the `fingerprint` is the same wherever the text, the
tokenizer and the split are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distllm.config import schema
from distllm.data.cache import build_once, create_cache, lock
from distllm.data.preparation import quarantine
from distllm.data.preparation.corpus import Corpus
from distllm.data.preparation.prepare_tokenizer import prepare_tokenizer
from distllm.data.preparation.shards import Shard, missing_pieces
from distllm.data.preparation.token_files import check_token_files
from distllm.data.prepared import PreparedData, PreparedSource, Split
from distllm.data.token_stream import check_vocabulary
from distllm.data.tokenizer import TextTokenizer

Report = Callable[[str], None]


def prepare(
    data: schema.Data,
    preparation: schema.Preparation,
    tokenizer: schema.Tokenizer,
    report: Report,
    unit_bytes: int | None = None,
) -> PreparedData:
    """Return the token files of all sources of `data`, from the cache or made now.

    Every rank may call it; it needs no process group. What killed processes and shards have finished is used.

    report: gets progress, a line at a time. unit_bytes: see `Corpus`.
    User errors: those of the sources and of the tokenizer; no document for training, or none for validation
    though data.validation_fraction > 0; a token file in the cache that was changed.
    """
    corpora = _corpora(data, preparation, tokenizer, report, unit_bytes)
    sources = {corpus.name: prepare_source(corpus, report) for corpus in corpora}
    made = corpora[0].tokenizer
    return PreparedData(corpora[0].tokenizer_folder, made.vocab_size, made.end_of_document, sources)


def prepare_shard(
    data: schema.Data,
    preparation: schema.Preparation,
    tokenizer: schema.Tokenizer,
    shard: Shard,
    report: Report,
    unit_bytes: int | None = None,
) -> None:
    """Make the pieces of `shard` of all sources; token files of another tool are left to `merge`."""
    for corpus in _corpora(data, preparation, tokenizer, report, unit_bytes):
        if corpus.is_tokenized:
            continue
        try:
            if not corpus.is_prepared:
                _make_share(corpus, shard, report)
        except OSError:
            if not corpus.is_prepared:  # else others have prepared it all, and removed the pieces
                raise
        if corpus.is_prepared:
            report(f"{corpus.name} is prepared already: {corpus.folder}")


def _make_share(corpus: Corpus, shard: Shard, report: Report) -> None:
    work = corpus.work(shard.label)
    indices = shard.units(len(work.units))
    create_cache(corpus.pieces)
    # By its time of change `merge` also learns which shards there are.
    with lock(corpus.pieces / f"{shard.label}.lock", report):
        if not corpus.is_prepared:
            corpus.make_pieces(work, indices, report)
            report(
                f"shard {shard}: {len(indices):,} of {len(work.units):,} pieces of {corpus.name} are complete"
            )


def merge(
    data: schema.Data,
    preparation: schema.Preparation,
    tokenizer: schema.Tokenizer,
    report: Report,
    unit_bytes: int | None = None,
) -> PreparedData:
    """Do as `prepare` does where all pieces exist. User error: some are missing."""
    for corpus in _corpora(data, preparation, tokenizer, report, unit_bytes):
        if not corpus.is_prepared and not corpus.is_tokenized:
            work = corpus.work()
            if missing := work.missing():
                raise missing_pieces(corpus.name, work, missing)
    return prepare(data, preparation, tokenizer, report, unit_bytes)


def prepare_source(corpus: Corpus, report: Report) -> PreparedSource:
    folder, was_there = corpus.folder, corpus.is_prepared
    manifest = build_once(folder, lambda unfinished: corpus.build(unfinished, report), report)
    if corpus.pieces.exists():
        shutil.rmtree(corpus.pieces, ignore_errors=True)
    if was_there:
        check_token_files(folder, manifest)
    if corpus.preparation.bad_input == "stop" and manifest.get("rejected"):
        with (folder / quarantine.FILE).open() as lines:
            raise quarantine.stopped(json.loads(next(lines)))
    prepared = PreparedSource(
        corpus.name,
        folder,
        train=_split(folder, manifest["train"]),
        validation=_split(folder, manifest["validation"]) if manifest["validation"] else None,
        fingerprint=manifest["fingerprint"],
        num_quarantined=sum(manifest.get("rejected", {}).values()),
    )
    for split in filter(None, (prepared.train, prepared.validation)):
        check_vocabulary(split.prefix, split.max_token, corpus.tokenizer.vocab_size)
    name = f"{corpus.name}: " if corpus.data.source == "mixture" else ""
    report(name + _summary(prepared))
    return prepared


def _corpora(
    data: schema.Data,
    preparation: schema.Preparation,
    tokenizer: schema.Tokenizer,
    report: Report,
    unit_bytes: int | None,
) -> list[Corpus]:
    folder = prepare_tokenizer(data, preparation, tokenizer, report)
    made = TextTokenizer.load(folder, tokenizer.end_of_document)
    return [Corpus.find(name, data, preparation, made, folder, unit_bytes) for name in data.named_sources]


def _split(folder: Path, described: dict[str, Any]) -> Split:
    return Split(**described | {"prefix": folder / described["prefix"]})


def _summary(prepared: PreparedSource) -> str:
    counts = []
    for name, split in (("train", prepared.train), ("validation", prepared.validation)):
        if split:
            num_bytes = "" if split.num_bytes is None else f", {split.num_bytes:,} bytes"
            counts.append(
                f"{name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens{num_bytes}"
            )
    return "; ".join(counts)

"""Rules of the data path that combine several settings; one small function each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distllm.config.data_schema import Source
from distllm.config.problems import Problem
from distllm.config.registry import SOURCES

if TYPE_CHECKING:
    from distllm.config.schema import Config

NAME = r"[A-Za-z0-9_-]+"


def placed_sources(config: Config) -> Iterator[tuple[str, Source]]:
    """Yield each source with the setting that holds it: `data`, or `data.sources.NAME` in a mixture."""
    for name, source in config.data.named_sources.items():
        yield config.data.place(name), source


def source_paths(config: Config, _: int) -> Iterator[Problem]:
    for place, source in placed_sources(config):
        yield from SOURCES[source.source].problems(place, source)


def mixture(config: Config, _: int) -> Iterator[Problem]:
    data = config.data
    if data.source != "mixture":
        if data.sources or data.changes:
            setting, value = ("data.sources", list(data.sources)) if data.sources else ("data.changes", "...")
            rule = f"belongs to data.source=mixture, not to {data.source}"
            yield Problem(setting, value, rule, "data=mixture")
        return
    if not data.sources:
        fix = "data.sources.NAME.source=text data.sources.NAME.path='FOLDER/**/*.txt', for each source"
        yield Problem("data.sources", {}, "a mixture needs a source", fix)
        return
    for setting in ("path", "subset", "max_epochs"):
        if (value := getattr(data, setting)) is not None:
            rule = "must be null for data.source=mixture: every source has its own"
            yield Problem(f"data.{setting}", value, rule, f"data.sources.NAME.{setting}={value}")
    for name in data.sources:
        if not re.fullmatch(NAME, name):
            rule = "the name of a source must consist of letters, digits, _ and -, since it names metrics"
            yield Problem("data.sources", name, rule, f"data.sources.{re.sub('[^A-Za-z0-9_-]', '_', name)}")
    if not any(source.weight for source in data.sources.values()):
        fix = "data.sources.NAME.weight=1"
        yield Problem("data.sources", list(data.sources), "one weight must be above 0", fix)


def mixture_changes(config: Config, _: int) -> Iterator[Problem]:
    data = config.data
    if data.source != "mixture" or not data.sources:
        return  # reported by `mixture`
    steps = [change.step for change in data.changes]
    for number, change in enumerate(data.changes):
        setting = f"data.changes.{number}"
        if change.weights.keys() != data.sources.keys():
            rule = f"must name every source, {', '.join(data.sources)}; a weight of 0 leaves one out"
            yield Problem(setting, list(change.weights), rule, "name all of them under weights")
        elif not any(change.weights.values()):
            yield Problem(setting, change.weights, "one weight must be above 0", "raise one")
        if steps.index(change.step) != number:
            rule = "another change has the same step"
            yield Problem(f"{setting}.step", change.step, rule, "keep one of them")


def megatron_tokenizer(config: Config, _: int) -> Iterator[Problem]:
    """Check the tokenizer where the tokens exist already: there is no text to train a tokenizer on."""
    kinds = [source.source for _, source in placed_sources(config)]
    tokenized = [kind for kind in kinds if SOURCES[kind].is_tokenized]
    tokenizer = config.tokenizer
    if tokenized and tokenizer.kind == "bpe" and tokenizer.path is None:
        rule = f"a BPE cannot be trained for data.source={tokenized[0]}, whose tokens were made with another"
        fix = "tokenizer=huggingface tokenizer.path=FOLDER of the tokenizer that made the tokens"
        yield Problem("tokenizer.kind", tokenizer.kind, rule, fix)


def data_found(config: Config, _: int) -> Iterator[Problem]:
    for place, source in placed_sources(config):
        yield from SOURCES[source.source].environment_problems(place, source)

"""The settings of the data path, typed: sources, mixtures, preparation, sequences. See `schema.py`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from distllm.config.registry import SOURCES

STRICT = ConfigDict(extra="forbid", strict=True)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class Source:
    """One corpus of a mixture; a job without a mixture has one.

    source: format of the documents; `megatron` is a pair of token files (.bin and .idx) of another tool, used
        as it is; `huggingface` a data set of the `datasets` library; `stdlib` is the Python standard library
        of the running interpreter.
    path: glob of files (`**` crosses folders); for `megatron` the .bin; for `huggingface` the name of a data
        set or a local folder; None for `stdlib`.
    text_field: key of the text in a JSON line, or column of Parquet, Arrow and Hugging Face rows.
    subset, split: of a Hugging Face data set; subset None is its only or default one.
    weight: fraction of the samples, relative to the other sources' weights; 0 leaves it out until a change.
    max_epochs: how often its documents may be seen at most; None means without limit.
    shuffle: whether every epoch has an order of its own; else all epochs use the order of the documents.
    """

    source: Annotated[str, SOURCES.choice()]
    path: str | None = None
    text_field: str = "text"
    subset: str | None = None
    split: str = "train"
    weight: NonNegativeFloat = 1.0
    max_epochs: PositiveInt | None = None
    shuffle: bool = True


@dataclass(frozen=True, config=STRICT)
class MixtureChange:
    """Other weights of the sources from a step on.

    step: number of updates after which they apply.
    weights: of the sources, all of which are named.
    """

    step: PositiveInt
    weights: dict[str, NonNegativeFloat]


@dataclass(frozen=True, config=STRICT)
class Data:
    """Documents to train on: those of one source, or of the named `sources` of a mixture.

    source, path, text_field, subset, split, max_epochs, shuffle: as in `Source`; in a `mixture` each source
        has its own, under `sources.NAME`.
    sources: of a mixture, by name; the names appear in metrics and ledger, and the order of a source depends
        on its name.
    changes: of the weights, at given steps.
    validation_fraction: fraction of the documents held out, of each source, chosen by a hash of their text
        (of `megatron`, the last documents).
    cache: folder of prepared corpora and trained tokenizers, keyed by content; shared between runs.
    """

    source: Annotated[str, SOURCES.choice("mixture")]
    path: str | None
    text_field: str
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    cache: str
    subset: str | None = None
    split: str = "train"
    max_epochs: PositiveInt | None = None
    shuffle: bool = True
    sources: dict[str, Source] = field(default_factory=dict)
    changes: list[MixtureChange] = field(default_factory=list)

    @property
    def named_sources(self) -> dict[str, Source]:
        """Return the sources by name; a job without a mixture has one, named by its kind."""
        if self.source == "mixture":
            return self.sources
        return {
            self.source: Source(
                source=self.source,
                path=self.path,
                text_field=self.text_field,
                subset=self.subset,
                split=self.split,
                max_epochs=self.max_epochs,
                shuffle=self.shuffle,
            )
        }

    def place(self, name: str) -> str:
        """Return the setting under which users write a source."""
        return f"data.sources.{name}" if self.source == "mixture" else "data"

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights of the sources in the update that follows `step` updates, in any unit."""
        weights = {name: source.weight for name, source in self.named_sources.items()}
        for change in sorted(self.changes, key=lambda change: change.step):
            if change.step <= step:
                weights = dict(change.weights)
        return weights


@dataclass(frozen=True, config=STRICT)
class Preparation:
    """From documents to token files; only bad_input and max_document_bytes change the result.

    workers: processes that tokenize, on all processor cores together; None means one for every two cores.
    bad_input: treatment of a row or file that cannot be used (broken JSON, a missing field, invalid UTF-8, an
        empty or too long document): `quarantine` counts it, writes file and row into quarantine.jsonl and
        continues; `stop` ends the job with the first.
    max_document_bytes: a longer document is bad input; None means without limit, in memory too.
    """

    workers: PositiveInt | None
    bad_input: Literal["quarantine", "stop"]
    max_document_bytes: PositiveInt | None


@dataclass(frozen=True, config=STRICT)
class Sequences:
    """From token files to training sequences of model.seq_length tokens.

    packing: `chunk` cuts the stream of documents every model.seq_length tokens, across documents; `best_fit`
        packs whole documents together so that there is little padding, and cuts only documents longer than a
        sequence (arXiv:2404.10830).
    document_mask: attention and positions restart at every document.
    prefetch: steps whose sequences are read ahead while the device computes; 0 means none.
    """

    packing: Literal["chunk", "best_fit"]
    document_mask: bool
    prefetch: NonNegativeInt

"""The loss on held-out documents: on the same sequences every time, in every layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from distllm.config.schema import Config
from distllm.data.prepared import PreparedData
from distllm.data.sequences import Samples, Sequences
from distllm.data.tokenizer import TextTokenizer
from distllm.engine.engine import Engine
from distllm.engine.microbatch import Microbatch
from distllm.metrics.meter import Row, gzip_bits_per_byte, validation_row
from distllm.trainer.batches import to_microbatch


@dataclass(frozen=True)
class Validation:
    """The held-out sequences: of each source the first `counts[name]` of its validation split, in its order.

    num_bytes: size of the text that their labels stand for.
    gzip_bits_per_byte: bits per byte of that text when `gzip -9` compresses it; None if there is no text.
    """

    sequences: Mapping[str, Sequences]
    counts: Mapping[str, int]
    num_bytes: int
    gzip_bits_per_byte: float | None
    micro_batch_size: int


def create_validation(
    config: Config, prepared: PreparedData, sequences: Mapping[str, Sequences]
) -> Validation | None:
    """Choose the held-out sequences; return None if no source has a validation split.

    sequences: of the validation split of each source that has one.
    """
    if not sequences:
        return None
    counts = share_out(config.train.validation_sequences, config.data.weights_at(0), sequences)
    tokenizer = TextTokenizer.load(prepared.tokenizer_folder, config.tokenizer.end_of_document)
    parts = [sequences[name].read(np.arange(count)) for name, count in counts.items()]
    labels = np.concatenate([_labels(part) for part in parts])
    return Validation(
        sequences,
        counts,
        num_bytes=int(tokenizer.token_byte_lengths()[labels].sum()),
        gzip_bits_per_byte=gzip_bits_per_byte(tokenizer.decode_bytes(labels.tolist())),
        micro_batch_size=config.train.micro_batch_size,
    )


def share_out(total: int, weights: Mapping[str, float], sequences: Mapping[str, Sequences]) -> dict[str, int]:
    """Return the number of validation sequences of each source, in proportion to its weight.

    Each source has at least one and no more than there are. The shares do not follow a change of the mixture,
    so that the validation losses of a run can be compared.
    """
    weight_sum = sum(weights[name] for name in sequences) or 1.0
    shares = {name: round(total * weights[name] / weight_sum) for name in sequences}
    return {name: min(max(share, 1), sequences[name].num_sequences) for name, share in shares.items()}


def validate(engine: Engine, validation: Validation, step: int) -> Row:
    """Return the row of one validation, after `step` updates. Collective."""
    sums = {
        name: engine.evaluate(
            validation_microbatches(engine, sequences, validation.counts[name], validation.micro_batch_size)
        ).tolist()
        for name, sequences in validation.sequences.items()
    }
    nats = sum(of_source[0] for of_source in sums.values())
    num_tokens = sum(of_source[1] for of_source in sums.values())
    row = validation_row(step, nats, round(num_tokens), validation.num_bytes)
    if len(sums) > 1:
        row |= {f"validation_loss/{name}": total / max(count, 1.0) for name, (total, count) in sums.items()}
    return row


def validation_microbatches(
    engine: Engine, sequences: Sequences, count: int, micro_batch_size: int
) -> list[Microbatch]:
    """Return this rank's share of the first `count` sequences.

    All ranks run the same number of microbatches, since forward passes contain collectives. If there are too
    few sequences, the last microbatches are padded with sequences of weight 0.
    """
    dp_rank, dp_size = engine.groups.samples.rank, engine.groups.samples.size
    microbatches = []
    for microbatch in range(math.ceil(count / (micro_batch_size * dp_size))):
        first = (microbatch * dp_size + dp_rank) * micro_batch_size
        numbers = np.arange(first, first + micro_batch_size)
        # Beyond the end any sequence will do: its weight is 0.
        samples = sequences.read(np.minimum(numbers, count - 1))
        weights = np.ones((len(numbers), sequences.seq_length), np.float32)
        if samples.loss_weights is not None:
            weights = samples.loss_weights.copy()
        weights[numbers >= count] = 0
        microbatches.append(
            to_microbatch(replace(samples, loss_weights=weights), engine.objective, engine.device)
        )
    return microbatches


def _labels(samples: Samples) -> np.ndarray:
    """Return the tokens that count as labels, int64 [n]."""
    labels = samples.tokens[:, 1:]
    return labels.ravel() if samples.loss_weights is None else labels[samples.loss_weights > 0]

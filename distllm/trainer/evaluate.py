"""Loss on held-out documents: the same sequences every time, whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from distllm.config.schema import Config
from distllm.data.loader import Batches
from distllm.data.prepared import PreparedData
from distllm.data.tokenizer import TextTokenizer
from distllm.engine.engine import Engine
from distllm.engine.pipeline import Microbatch
from distllm.metrics.meter import Row, gzip_bits_per_byte, validation_row


@dataclass(frozen=True)
class Validation:
    """The held-out sequences: the first `num_sequences` of the validation split, in its order.

    num_bytes: text that their labels stand for. gzip_bits_per_byte: what `gzip -9` makes of that text.
    """

    batches: Batches
    num_sequences: int
    num_bytes: int
    gzip_bits_per_byte: float | None
    micro_batch_size: int


def create_validation(config: Config, prepared: PreparedData) -> Validation | None:
    """None where the job never validates."""
    if prepared.validation is None or config.train.validation_interval == 0:
        return None
    batches = Batches(prepared.validation, config.model.seq_length, config.train.seed, shuffle=False)
    num_sequences = min(config.train.validation_sequences, batches.num_sequences)
    tokenizer = TextTokenizer.load(prepared.tokenizer_folder, config.tokenizer.end_of_document)
    labels = batches.samples(0, num_sequences)[:, 1:]
    return Validation(
        batches,
        num_sequences,
        num_bytes=int(tokenizer.token_byte_lengths()[labels].sum()),
        gzip_bits_per_byte=gzip_bits_per_byte(tokenizer.decode_bytes(labels.ravel().tolist())),
        micro_batch_size=config.train.micro_batch_size,
    )


def validate(engine: Engine, validation: Validation, step: int) -> Row:
    """The row of one validation, after `step` updates. Collective."""
    sums = engine.evaluate(validation_microbatches(engine, validation))
    nats, num_tokens = sums.tolist()
    return validation_row(step, nats, round(num_tokens), validation.num_bytes)


def validation_microbatches(engine: Engine, validation: Validation) -> list[Microbatch]:
    """This rank's share. All ranks run equally many microbatches, since their passes hold collectives; where
    the sequences do not suffice, the last are padded with sequences of weight 0."""
    dp_size, dp_rank = engine.groups.grid.data, engine.groups.coordinates.data
    per_microbatch = validation.micro_batch_size
    num_microbatches = math.ceil(validation.num_sequences / (per_microbatch * dp_size))
    device = engine.device
    microbatches = []
    for microbatch in range(num_microbatches):
        first = (microbatch * dp_size + dp_rank) * per_microbatch
        numbers = np.arange(first, first + per_microbatch)
        counts = torch.from_numpy((numbers < validation.num_sequences).astype(np.float32)).to(device)
        # Beyond the end any sequence will do: its weight is 0.
        tokens = np.concatenate(
            [validation.batches.samples(min(n, validation.num_sequences - 1), 1) for n in numbers.tolist()]
        )
        microbatches.append(
            Microbatch(
                torch.from_numpy(tokens).to(device),
                weights=counts[:, None].expand(-1, validation.batches.seq_length),
            )
        )
    return microbatches

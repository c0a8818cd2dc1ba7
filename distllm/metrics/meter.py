"""Turn the measurements of a step into a row of `metrics.jsonl`. Pure."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping

Row = dict[str, float | int]


def training_row(
    *,
    step: int,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    consumed_samples: int,
    consumed_by_source: Mapping[str, int],
    step_seconds: float,
    global_batch_size: int,
    seq_length: int,
    flops_per_token: float,
    peak_flops: float | None,
    peak_memory_bytes: int | None,
) -> Row:
    """Return the row of one optimizer update.

    step: 1 after the first update.
    loss: nats per token, mean over the global batch.
    consumed_samples: of the whole run, this step included.
    consumed_by_source: the same, of each source of a mixture.
    step_seconds: wall-clock time of the whole step.
    global_batch_size: sequences of seq_length tokens.
    flops_per_token: forward and backward, over the whole model.
    peak_flops: per second, over all devices; None when unknown, and then there is no `mfu`.
    peak_memory_bytes: of the rank that uses most.
    """
    tokens_per_step = global_batch_size * seq_length
    tokens_per_second = tokens_per_step / step_seconds if step_seconds > 0 else math.nan
    row: Row = {
        "step": step,
        "loss": float(loss),
        "grad_norm": float(grad_norm),
        "learning_rate": float(learning_rate),
        "consumed_samples": consumed_samples,
        "consumed_tokens": consumed_samples * seq_length,
        "step_seconds": float(step_seconds),
        "tokens_per_second": tokens_per_second,
    }
    if len(consumed_by_source) > 1:
        for name, samples in consumed_by_source.items():
            row[f"consumed_tokens/{name}"] = samples * seq_length
    if peak_flops is not None:
        row["mfu"] = flops_per_token * tokens_per_second / peak_flops
    if peak_memory_bytes is not None:
        row["peak_memory_bytes"] = peak_memory_bytes
    return row


def validation_row(step: int, nats_total: float, num_tokens: int, num_bytes: int) -> Row:
    """Return the row of one validation.

    nats_total: summed loss over num_tokens predicted tokens, which stand for num_bytes bytes of text.

    Bits per byte compare models across tokenizers. A number without tokens or bytes to divide by is left out.
    """
    row: Row = {"step": step}
    if num_tokens:
        row["validation_loss"] = float(nats_total) / num_tokens
    if num_bytes:
        row["validation_bits_per_byte"] = float(nats_total) / math.log(2) / num_bytes
    return row


def gzip_bits_per_byte(text: bytes) -> float | None:
    """Return bits per byte of `gzip -9` on `text`, which a trained model should beat; None for no text."""
    if not text:
        return None
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)

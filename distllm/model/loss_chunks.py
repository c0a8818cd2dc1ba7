"""The number of tokens that the loss takes at a time (model/loss.py). Pure."""

from __future__ import annotations

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in fp32


def tokens_per_chunk(num_rows: int, logits_per_chunk: int = LOGITS_PER_CHUNK) -> int:
    """Return the tokens whose logits for `num_rows` rows of the output layer are computed at once."""
    return max(1024, logits_per_chunk // num_rows)  # with fewer tokens products would be slow


def chunks_of_tokens(num_tokens: int, num_rows: int) -> int:
    """Return the number of chunks in which the loss of `num_tokens` is computed."""
    return -(-num_tokens // tokens_per_chunk(num_rows))

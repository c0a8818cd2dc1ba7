"""Megatron Core's GPT with a padded vocabulary whose padding is never predicted."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor


class GPT(GPTModel):
    """`GPTModel` over `padded_vocab_size` rows, of which only the first `vocab_size` are tokens."""

    def __init__(self, *args: Any, vocab_size: int, padded_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, vocab_size=padded_vocab_size, **kwargs)
        self.num_tokens_in_vocabulary = vocab_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels: [batch, seq]; logits: [seq, batch, padded_vocab/tp] -> losses in nats, [batch, seq]."""
        losses: Tensor = super().compute_language_model_loss(labels, self._without_padding(logits))
        return losses

    def _without_padding(self, logits: Tensor) -> Tensor:
        """A probability of 0 for what is no token, in place: a copy of the logits would be the largest tensor
        of the model."""
        first = self.pg_collection.tp.rank() * logits.size(-1)
        num_real = self.num_tokens_in_vocabulary - first
        if num_real < logits.size(-1):
            logits[..., max(0, num_real) :] = -math.inf
        return logits

"""The input of one forward pass on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one forward pass on one rank.

    tokens: [micro_batch, seq + 1] integers; inputs are all but the last, labels all but the first.
    loss_weights: [micro_batch, seq] weight of each label in sums over tokens, not below 0; None means that
        all count alike.
    document_starts: [num_documents + 1] int32 on the device of the tokens, rising from 0 to micro_batch *
        seq: where documents begin in the inputs, sequence after sequence. Attention and positions start anew
        in each document. Every sequence begins one. None means that each sequence is one document.
    """

    tokens: Tensor
    loss_weights: Tensor | None = None
    document_starts: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1].contiguous()

    @property
    def labels(self) -> Tensor:
        return self.tokens[:, 1:].contiguous()

    @property
    def positions(self) -> Tensor:
        """Return the position of each input in its document, [micro_batch, seq], for learned embeddings.

        Megatron's rotary embedding ignores these and counts from the start of the sequence. That is
        equivalent, up to rounding: attention scores depend on differences of positions, which are the same
        inside a document.
        """
        batch, seq = self.tokens.size(0), self.tokens.size(1) - 1
        if self.document_starts is None:
            return torch.arange(seq, device=self.tokens.device).expand(batch, seq)
        starts = self.document_starts.long()
        flat = torch.arange(batch * seq, device=self.tokens.device)
        document = torch.searchsorted(starts, flat, right=True) - 1
        return (flat - starts[document]).view(batch, seq)

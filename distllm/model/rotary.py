"""Cosines and sines of rotary position embeddings (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor


class RotaryTables(RotaryEmbedding):
    """Tables of cosines and sines, made once; Megatron's holds angles, from which each layer makes them."""

    tables: Tensor | None = None

    def forward(self, max_seq_len: int, **_: Any) -> Tensor:
        """Return [2, seq, 1, 1, head_dim/2] in fp32: cosines and sines of each position's angles."""
        if self.tables is None or self.tables.size(1) < max_seq_len:
            cos, sin = self.get_cos_sin(max_seq_len)
            self.tables = torch.stack([cos, sin])[:, :, None, None]
        return self.tables[:, :max_seq_len]

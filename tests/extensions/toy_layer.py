"""The layer of the toy family; imported when a model is built."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from distllm.model.layers import FeedForward
from distllm.model.norm import summed_over_sequence


class ScaledFeedForward(FeedForward):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden_states)
        return output * summed_over_sequence(self.scale, self.config.sequence_parallel), bias

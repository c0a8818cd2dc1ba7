"""The halves of a layer: Megatron Core's modules, with our arithmetic between their projections."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from distllm.model.kernels import AS_WRITTEN, Kernels
from distllm.model.norm import summed_over_sequence


class RowParallelLinearWithBias(RowParallelLinear):
    """A row-parallel projection with bias.

    Under sequence parallelism the bias is added to parts of the sequence, like a norm (see norm.py).
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return output, None if bias is None else summed_over_sequence(bias, self.sequence_parallel)


class Attention(SelfAttention):
    """Attention that splits and rotates in one kernel.

    Megatron's takes a dozen passes over queries and keys to split, rotate and copy them.
    """

    kernels: Kernels = AS_WRITTEN

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, of the shape of hidden_states, and a bias that is not added yet.

        hidden_states: [seq (/tp), batch, hidden]; attention_mask: see CausalAttention; rotary_pos_emb: the
            tables of RotaryTables.
        """
        kernels = self.kernels if self.training else AS_WRITTEN
        mixed, _ = self.linear_qkv(hidden_states)  # [seq, batch, (heads + 2 * groups)/tp * head_dim]
        query, key, value = kernels.split_heads(
            mixed, self.num_query_groups_per_partition, self.hidden_size_per_attention_head, rotary_pos_emb
        )
        if self.checkpoint_core_attention and self.training:
            context = self._checkpointed_attention_forward(query, key, value, attention_mask)
        else:
            context = self.core_attention(query, key, value, attention_mask)
        output, bias = self.linear_proj(context)
        return output, bias


class FeedForward(MLP):
    """A feed-forward network. Megatron's adds zero to the whole projection before it multiplies."""

    kernels: Kernels = AS_WRITTEN

    def __init__(self, config: TransformerConfig) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinearWithBias)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Map [seq (/tp), batch, hidden] to the same shape, and a bias that is not added yet."""
        kernels = self.kernels if self.training else AS_WRITTEN
        hidden, bias = self.linear_fc1(hidden_states)  # [seq, batch, (2 *) ffn/tp]
        if bias is not None:
            hidden = hidden + bias
        activation = kernels.swiglu if self.config.gated_linear_unit else self.config.activation_func
        output, bias = self.linear_fc2(activation(hidden))
        return output, bias

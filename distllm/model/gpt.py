"""Megatron Core's GPT with a padded vocabulary whose padding is never predicted, and a loss in chunks."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from distllm.model.kernels import AS_WRITTEN, Kernels
from distllm.model.loss import VocabularyPart, linear_cross_entropy
from distllm.model.rotary import RotaryTables


class OutputLayer(ColumnParallelLinear):
    """Megatron's output layer, which also computes the loss.

    It does so inside of its `forward`, since ZeRO-3 gathers a module's weights where the module is called,
    and nowhere else.
    """

    num_tokens_in_vocabulary: int
    kernels: Kernels = AS_WRITTEN

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> Any:
        """Return the loss, see `linear_cross_entropy`; without labels the logits, as Megatron's does."""
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        first = self.tp_group.rank() * len(weight)
        part = VocabularyPart(first, self.num_tokens_in_vocabulary - first, self.tp_group)
        kernels = self.kernels if self.training else AS_WRITTEN
        return linear_cross_entropy(
            input_, weight, labels, token_weights, part, self.sequence_parallel, kernels
        )


class GPT(GPTModel):
    """`GPTModel` over `padded_vocab_size` rows, of which only the first `vocab_size` are tokens.

    With labels the last chunk returns the sum of loss_mask * loss if there is a loss_mask, [batch, seq], and
    else the losses of all tokens, [batch, seq]: the negative of their log-probabilities.
    """

    def __init__(self, *args: Any, vocab_size: int, padded_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(*args, vocab_size=padded_vocab_size, **kwargs)
        # Megatron 0.16.1 looks both classes up by name; there is no other way to replace them.
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb.__class__ = RotaryTables
        if self.post_process:
            self.output_layer.__class__ = OutputLayer
            self.output_layer.num_tokens_in_vocabulary = vocab_size

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None,
        *args: Any,
        loss_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.post_process or labels is None:
            output: Tensor = super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, loss_mask=loss_mask, **kwargs
            )
            return output
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        loss: Tensor = self.output_layer(hidden_states, weight=tied, labels=labels, token_weights=loss_mask)
        return loss

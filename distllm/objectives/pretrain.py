"""Pretraining: the mean cross-entropy of the next token, by the weights of the labels."""

from __future__ import annotations

from torch import Tensor

from distllm.engine.microbatch import Microbatch
from distllm.engine.objective import Objective


class Pretrain(Objective):
    """sum(weight * loss) / sum(weight) over the global batch.

    Where all weights are 0, loss and gradients are 0 (and the update is by decay and momentum only). Either
    all microbatches of all ranks have weights or none.
    """

    def loss_weights(self, batch: Microbatch) -> Tensor | None:
        return batch.loss_weights

    def loss(self, output: Tensor, batch: Microbatch) -> Tensor:
        return output

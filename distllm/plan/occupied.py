"""What occupies a device beside states and activations, counted where `cluster.device` names one. Pure.

Libraries (plan/libraries.py, estimates), communication (plan/buckets.py), the layers that ZeRO-3 gathers
(plan/live.py), the workspace of the loss and the peak of the start (plan/startup.py). Not counted: temporary
tensors of the layer that is being computed, and the fragmentation of PyTorch's allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.model.loss_chunks import tokens_per_chunk
from distllm.plan.buckets import bucket_bytes, computed_gradient, sent_copies
from distllm.plan.gradients import BYTES
from distllm.plan.libraries import communicator_bytes, context_bytes
from distllm.plan.live import live_parameters
from distllm.plan.rank_view import RankView


@dataclass(frozen=True)
class Occupied:
    """Bytes at the peak of a step.

    context: CUDA context, kernels and cuBLAS's workspaces; an estimate, 0 on a CPU.
    communicators: NCCL's buffers; an estimate, 0 on a CPU.
    buckets: DeepSpeed's, of `zero.bucket_size` elements.
    sent_copies: of gradients, cast and joined for a message of the backward pass. Those of stage 1, which
        sends when activations are gone, are part of the update copies.
    computed_gradient: the largest gradient before it is moved.
    gathered_layers: parameters that ZeRO-3 holds whole, and the buffer of a gather.
    loss_workspace: hidden states of a chunk of tokens, scaled, in fp32 and in the model's precision.
    start_up: of the start beyond all of a step.
    """

    context: int
    communicators: int
    buckets: int
    sent_copies: int
    computed_gradient: int
    gathered_layers: int
    loss_workspace: int
    start_up: int = 0

    @property
    def always(self) -> int:
        """Return the bytes of what is there from the start to the end."""
        return self.context + self.communicators

    @property
    def in_backward(self) -> int:
        """Return the bytes of what is there together with activations only."""
        return self.sent_copies + self.computed_gradient + self.gathered_layers + self.loss_workspace


def occupied(view: RankView) -> Occupied:
    """Return what occupies the device of a rank in a step."""
    return Occupied(
        context=context_bytes(view.config),
        communicators=communicator_bytes(view),
        buckets=bucket_bytes(view),
        sent_copies=sent_copies(view) if view.config.zero.stage >= 2 else 0,
        computed_gradient=computed_gradient(view),
        gathered_layers=_gathered_layers(view),
        loss_workspace=_loss_workspace(view) if view.stage.is_last else 0,
    )


def copies_at_update(view: RankView) -> int:
    """Return bytes of the copies that stage 1 sends after the last backward pass."""
    return sent_copies(view) if view.config.zero.stage == 1 else 0


def _gathered_layers(view: RankView) -> int:
    if view.config.zero.stage < 3 or view.dp_size == 1:  # a single rank's part is the whole
        return 0
    live = live_parameters(view)
    return BYTES[view.config.train.precision] * (live.held + live.gathered)


def _loss_workspace(view: RankView) -> int:
    """Return bytes of `hidden * scale` for a chunk of tokens in model/loss.py, and of its cast."""
    tokens = view.tokens_per_microbatch
    chunk = min(tokens, tokens_per_chunk(view.padded_vocab_size // view.grid.tensor))
    working = BYTES[view.config.train.precision]
    return chunk * view.config.model.hidden_size * (4 + (working if working < 4 else 0))

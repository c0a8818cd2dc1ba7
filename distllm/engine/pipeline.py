"""Forward and backward passes of one step, by Megatron Core's schedules.

The same call drives every layout: without pipeline stages the schedule is a plain loop over microbatches,
with them it is 1F1B, with several chunks per stage interleaved 1F1B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from distllm.config.stages import microbatch_group_size
from distllm.engine.phases import Phases
from distllm.layout.groups import Groups


@dataclass(frozen=True)
class Microbatch:
    """Sequences of one forward pass on one rank.

    tokens: [micro_batch, seq + 1] integers; inputs are all but the last, labels all but the first.
    weights: [micro_batch, seq] of each label in sums over tokens, not below 0; None means all count.
    document_starts: [num_documents + 1] int32 on the device of the tokens, rising from 0 to micro_batch *
    seq: where documents begin in the inputs, sequence after sequence. Attention and positions start anew in
    each. Every sequence begins one. None means that a sequence is one document.
    """

    tokens: Tensor
    weights: Tensor | None = None
    document_starts: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1].contiguous()

    @property
    def labels(self) -> Tensor:
        return self.tokens[:, 1:].contiguous()

    @property
    def positions(self) -> Tensor:
        """[micro_batch, seq], for learned embeddings.

        Megatron's rotary embedding counts from the start of the sequence whatever is given. That is as good,
        up to rounding: scores depend on differences of positions, equal inside a document.
        """
        batch, seq = self.tokens.size(0), self.tokens.size(1) - 1
        if self.document_starts is None:
            return torch.arange(seq, device=self.tokens.device).expand(batch, seq)
        starts = self.document_starts.long()
        flat = torch.arange(batch * seq, device=self.tokens.device)
        document = torch.searchsorted(starts, flat, right=True) - 1
        return (flat - starts[document]).view(batch, seq)


def train_loss(
    chunks: Sequence[nn.Module], microbatches: Sequence[Microbatch], groups: Groups, phases: Phases
) -> Tensor:
    """Forward and backward over all microbatches; gradients are those of the mean loss over them.

    With weights it is sum(weight * loss) / sum(weight) over the global batch, whose mean over the
    data-parallel ranks is taken elsewhere. Where all weights are 0, loss and gradients are 0 (and the update
    is by decay and momentum only). Either all microbatches of all ranks have weights or none.

    Megatron divides each microbatch's loss by their number; nobody else may. Returns the mean loss in nats
    over this data-parallel rank's microbatches (with weights: its part, such that the mean over the ranks is
    the loss), on every stage.
    """
    with phases.phase("forward"):
        microbatches = _normalize_weights(microbatches, groups)

    def weighted(loss: Tensor, _: Microbatch) -> tuple[Tensor, Tensor]:
        return loss, loss.detach().clone()  # Megatron divides the first in place

    forward_step = _loss_step(weighted, is_weighted=True)
    losses = _run(forward_step, chunks, microbatches, groups, forward_only=False, phases=phases)
    mean_loss = (
        torch.stack(losses).mean() if losses else microbatches[0].tokens.new_zeros((), dtype=torch.float32)
    )
    if groups.grid.pipeline == 1:
        return mean_loss
    with phases.phase("pipeline_wait"):
        return from_last_stage(mean_loss, groups)


def _normalize_weights(microbatches: Sequence[Microbatch], groups: Groups) -> Sequence[Microbatch]:
    """Weights whose sums, in the mean over microbatches and data-parallel ranks, are 1 for the global batch;
    all 0 if they were. Waits for no device."""
    weights = [batch.weights for batch in microbatches if batch.weights is not None]
    if not weights:
        labels = microbatches[0].labels
        even = torch.full(labels.shape, 1 / labels.numel(), device=labels.device)
        return [replace(batch, weights=even) for batch in microbatches]
    assert len(weights) == len(microbatches), "only some microbatches have weights"
    total = torch.stack([w.sum(dtype=torch.float64) for w in weights]).sum()
    dist.all_reduce(total, group=groups.data)
    # Not `where` with a number, which is copied to the device, and that waits for the device.
    scale = (len(microbatches) * groups.grid.data / total).masked_fill(total <= 0, 0.0).float()
    return [replace(batch, weights=w.float() * scale) for batch, w in zip(microbatches, weights, strict=True)]


@torch.no_grad()
def loss_sums(chunks: Sequence[nn.Module], microbatches: Sequence[Microbatch], groups: Groups) -> Tensor:
    """Forward only: [sum of weight * loss, sum of weights] over this rank's microbatches, in fp64."""

    def sums(losses: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
        weights = batch.weights if batch.weights is not None else torch.ones_like(losses)
        both = torch.stack([(losses.double() * weights).sum(), weights.double().sum()])
        return losses.mean(), both

    missing = _least_number_of_microbatches(groups) - len(microbatches)
    nothing = replace(microbatches[-1], weights=torch.zeros_like(microbatches[-1].labels))
    padded = [*microbatches, *(nothing for _ in range(missing))]
    results = _run(_loss_step(sums), chunks, padded, groups, forward_only=True)
    total = (
        torch.stack(results).sum(0) if results else microbatches[0].tokens.new_zeros(2, dtype=torch.float64)
    )
    return from_last_stage(total, groups)


@torch.no_grad()
def all_logits(
    chunks: Sequence[nn.Module],
    tokens: Tensor,
    groups: Groups,
    vocab_size: int,
    document_starts: Tensor | None = None,
) -> Tensor:
    """[batch, seq] integers, equal on all ranks -> [batch, seq, vocab_size] in fp32, on all ranks.

    document_starts: [num_documents + 1] in [batch * seq], as in Microbatch.
    """
    batch, seq = tokens.shape
    # Sequence parallelism cuts the sequence evenly; what is appended is in the future of every real token.
    padding = -seq % groups.grid.tensor
    padded = torch.nn.functional.pad(tokens, (0, padding + 1))  # and one label that nothing reads
    if document_starts is not None:
        document_starts = document_starts + document_starts // seq * padding  # of the sequences before

    def forward_step(iterator: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        output = chunk(microbatch.inputs, microbatch.positions, microbatch.document_starts)
        return output, lambda logits: (logits.float().mean(), logits.float())

    microbatch = Microbatch(padded, document_starts=document_starts)
    microbatches = [microbatch] * _least_number_of_microbatches(groups)
    results = _run(forward_step, chunks, microbatches, groups, forward_only=True)
    if results:
        parts = [torch.empty_like(results[0]) for _ in range(groups.grid.tensor)]
        dist.all_gather(parts, results[0].contiguous(), group=groups.tensor)
        logits = torch.cat(parts, dim=-1)[:, :seq, :vocab_size].contiguous()
    else:
        logits = torch.empty(batch, seq, vocab_size, device=tokens.device)
    return from_last_stage(logits, groups)


def from_last_stage(value: Tensor, groups: Groups) -> Tensor:
    """Give every stage what the last one has computed, in place."""
    if groups.grid.pipeline > 1:
        last = dist.get_process_group_ranks(groups.pipeline)[-1]
        dist.broadcast(value, src=last, group=groups.pipeline)
    return value


def _loss_step(
    reduce: Callable[[Tensor, Microbatch], tuple[Tensor, Tensor]], is_weighted: bool = False
) -> Callable[..., Any]:
    """Megatron's forward step: run a chunk, and say how the last one's losses become a number.

    is_weighted: the last chunk sums them up by the microbatch's weights, which is what has gradients.
    """

    def forward_step(iterator: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        output = chunk(
            batch.inputs,
            batch.positions,
            batch.document_starts,
            labels=batch.labels,
            loss_mask=batch.weights if is_weighted else None,
        )
        return output, lambda losses: reduce(losses, batch)

    return forward_step


def _least_number_of_microbatches(groups: Groups) -> int:
    """Megatron's interleaved schedule must fill the pipeline at least once, also forward only."""
    return groups.grid.pipeline if groups.num_chunks > 1 else 1


def _run(
    forward_step: Callable[..., Any],
    chunks: Sequence[nn.Module],
    microbatches: Sequence[Microbatch],
    groups: Groups,
    forward_only: bool,
    phases: Phases | None = None,
) -> list[Tensor]:
    """What the last stage's loss function returned for each microbatch; empty on other stages."""
    for chunk in chunks:
        chunk.config.timers = phases.megatron_timers if phases else None  # type: ignore[union-attr]
    micro_batch_size, seq_plus_one = microbatches[0].tokens.shape
    if groups.num_chunks > 1:
        # Megatron's default, the number of stages, takes only multiples of it as numbers of microbatches.
        group_size = microbatch_group_size(len(microbatches), groups.grid.pipeline)
        for chunk in chunks:
            chunk.config.microbatch_group_size_per_vp_stage = group_size  # type: ignore[union-attr]
    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=seq_plus_one - 1,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return results

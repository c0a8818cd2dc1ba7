"""Forward and backward passes of one step, run by Megatron Core's schedules.

The same call serves every layout: the schedule is a plain loop over microbatches without pipeline stages,
1F1B with them, and interleaved 1F1B with several chunks per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from distllm.config.stages import microbatch_group_size
from distllm.engine.microbatch import Microbatch
from distllm.engine.objective import Objective
from distllm.engine.phases import Phases
from distllm.layout.groups import Groups


def train_loss(
    chunks: Sequence[nn.Module],
    microbatches: Sequence[Microbatch],
    groups: Groups,
    objective: Objective,
    phases: Phases,
) -> Tensor:
    """Run forward and backward passes over all microbatches; return the mean of their losses on every stage.

    Gradients are those of this mean. Megatron divides each microbatch's loss by the number of microbatches;
    nothing else may. The mean over the data-parallel ranks of the returned loss is the loss of the step.
    """
    with phases.phase("forward"):
        microbatches = objective.prepare(microbatches, groups)

    def reduce(output: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
        loss = objective.loss(output, batch)
        return loss, loss.detach().clone()  # Megatron divides the first in place

    forward_step = _loss_step(reduce, objective.loss_weights)
    losses = _run(forward_step, chunks, microbatches, groups, forward_only=False, phases=phases)
    mean_loss = (
        torch.stack(losses).mean() if losses else microbatches[0].tokens.new_zeros((), dtype=torch.float32)
    )
    if groups.grid.pipeline == 1:
        return mean_loss
    with phases.phase("pipeline_wait"):
        return from_last_stage(mean_loss, groups)


@torch.no_grad()
def loss_sums(
    chunks: Sequence[nn.Module], microbatches: Sequence[Microbatch], groups: Groups, objective: Objective
) -> Tensor:
    """Return [sum of weight * loss, sum of weights] over this rank's microbatches, in fp64.

    Runs forward passes only.
    """

    def sums(losses: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
        return losses.mean(), objective.validation_sums(losses, batch)

    missing = _least_number_of_microbatches(groups) - len(microbatches)
    nothing = replace(microbatches[-1], loss_weights=torch.zeros_like(microbatches[-1].labels))
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
    """Return the logits, [batch, seq, vocab_size] in fp32, on all ranks.

    tokens: [batch, seq] integers, equal on all ranks.
    document_starts: [num_documents + 1] in [batch * seq], as in Microbatch.
    """
    batch, seq = tokens.shape
    # Sequence parallelism cuts the sequence evenly; the padding is in the future of every real token.
    padding = -seq % groups.grid.tensor
    padded = torch.nn.functional.pad(tokens, (0, padding + 1))  # and one label that nothing reads
    if document_starts is not None:
        document_starts = document_starts + document_starts // seq * padding  # that of the sequences before

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
    """Broadcast `value` from the last pipeline stage to the others, in place, and return it."""
    if groups.grid.pipeline > 1:
        last = dist.get_process_group_ranks(groups.pipeline)[-1]
        dist.broadcast(value, src=last, group=groups.pipeline)
    return value


def _loss_step(
    reduce: Callable[[Tensor, Microbatch], tuple[Tensor, Tensor]],
    loss_weights: Callable[[Microbatch], Tensor | None] = lambda _: None,
) -> Callable[..., Any]:
    """Return a forward step for Megatron: it runs a chunk, and says how the last chunk's output is reduced.

    loss_weights: the weights by which the last chunk sums up the losses of a microbatch's tokens; if they are
        None, it returns the losses of all tokens.
    """

    def forward_step(iterator: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        output = chunk(
            batch.inputs,
            batch.positions,
            batch.document_starts,
            labels=batch.labels,
            loss_mask=loss_weights(batch),
        )
        return output, lambda output: reduce(output, batch)

    return forward_step


def _least_number_of_microbatches(groups: Groups) -> int:
    """Return the least number of microbatches that the schedule can run, also forward only.

    Megatron's interleaved schedule must fill the pipeline at least once.
    """
    return groups.grid.pipeline if groups.num_chunks > 1 else 1


def _run(
    forward_step: Callable[..., Any],
    chunks: Sequence[nn.Module],
    microbatches: Sequence[Microbatch],
    groups: Groups,
    forward_only: bool,
    phases: Phases | None = None,
) -> list[Tensor]:
    """Run the schedule; return what the last stage's loss function returned for each microbatch.

    The list is empty on other stages.
    """
    for chunk in chunks:
        chunk.config.timers = phases.megatron_timers if phases else None  # type: ignore[union-attr]
    micro_batch_size, seq_plus_one = microbatches[0].tokens.shape
    if groups.num_chunks > 1:
        # Megatron's default is the number of stages, which must then divide the number of microbatches.
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

"""A hand-written loop over distllm's own model: what is missing to `ours.py` is what its engine costs."""

from __future__ import annotations

import contestant
import torch
from contestant import Job
from ours import build
from torch import nn


def main() -> None:
    job, turns = contestant.start()
    _, _, built = build(job)
    # --- what its user writes
    (model,) = built.chunks
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().float().clone()) if job.is_bf16 else p for p in parameters]
    optimizer = torch.optim.AdamW(
        masters,
        lr=contestant.LEARNING_RATE,
        betas=contestant.BETAS,
        eps=contestant.EPSILON,
        weight_decay=contestant.WEIGHT_DECAY,
        fused=True,
    )
    turns.parameters = sum(p.numel() for p in parameters)
    for microbatches in contestant.batches(job):
        step_loss = 0.0
        for tokens in microbatches:
            loss = loss_of(job, model, tokens)
            loss.backward()
            step_loss += loss.item()
        if job.is_bf16:
            for master, parameter in zip(masters, parameters, strict=True):
                assert parameter.grad is not None, "every parameter takes part"
                master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters, contestant.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if job.is_bf16:
            with torch.no_grad():
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.copy_(master)
        turns.step_ended(step_loss)


def loss_of(job: Job, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """A microbatch's share of the mean loss."""
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(job.seq_length).expand(job.micro_batch_size, -1)
    even = torch.full(labels.shape, 1 / labels.numel() / job.num_microbatches)
    loss: torch.Tensor = model(inputs, positions, None, labels=labels, loss_mask=even)
    return loss
    # --- end


if __name__ == "__main__":
    main()

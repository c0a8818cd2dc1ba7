"""transformers' Llama in a plain PyTorch loop; options: compile."""

from __future__ import annotations

import contestant
import llama
import torch
import transformers  # noqa: F401 - before memory counts


def main() -> None:
    job, turns = contestant.start()
    # --- what its user writes
    model = llama.build(job)
    turns.parameters = sum(p.numel() for p in model.parameters())
    forward = torch.compile(model) if job.options.get("compile") else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=contestant.LEARNING_RATE,
        betas=contestant.BETAS,
        eps=contestant.EPSILON,
        weight_decay=contestant.WEIGHT_DECAY,
        fused=True,
    )
    for microbatches in contestant.batches(job):
        step_loss = 0.0
        for tokens in microbatches:
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            with torch.autocast("cpu", torch.bfloat16, enabled=job.is_bf16):
                # shift_labels: they are shifted already, so that seq_length tokens are predicted.
                loss = forward(input_ids=inputs, labels=labels, shift_labels=labels).loss
            (loss / job.num_microbatches).backward()
            step_loss += loss.item() / job.num_microbatches
        torch.nn.utils.clip_grad_norm_(model.parameters(), contestant.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # --- end
        turns.step_ended(step_loss)


if __name__ == "__main__":
    main()

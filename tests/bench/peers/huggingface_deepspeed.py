"""transformers' Llama under DeepSpeed ZeRO; options: zero_stage."""

from __future__ import annotations

import contestant
import deepspeed
import llama
import torch
import transformers  # noqa: F401 - before memory counts


def main() -> None:
    job, turns = contestant.start()
    # --- what its user writes
    deepspeed.init_distributed("gloo")
    model = llama.build(job)
    turns.parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=contestant.LEARNING_RATE,
        betas=contestant.BETAS,
        eps=contestant.EPSILON,
        weight_decay=contestant.WEIGHT_DECAY,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": job.micro_batch_size,
            "gradient_accumulation_steps": job.num_microbatches,
            "zero_optimization": {"stage": job.options["zero_stage"]},
            "bf16": {"enabled": job.is_bf16},
            "gradient_clipping": contestant.CLIP_GRAD,
        },
    )
    for microbatches in contestant.batches(job):
        step_loss = 0.0
        for tokens in microbatches:
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            loss = engine(input_ids=inputs, labels=labels, shift_labels=labels).loss
            engine.backward(loss)
            engine.step()
            step_loss += loss.item() / job.num_microbatches
        # --- end
        turns.step_ended(step_loss)


if __name__ == "__main__":
    main()

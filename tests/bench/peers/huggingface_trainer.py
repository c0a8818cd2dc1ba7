"""transformers' Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import contestant
import llama
import torch
from contestant import Job, Turns
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments


# --- what its user writes
class Sequences(IterableDataset[dict[str, torch.Tensor]]):
    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for microbatches in contestant.batches(self.job):
            for tokens in microbatches:
                for sequence in tokens:
                    labels = sequence[1:].contiguous()
                    yield {"input_ids": sequence[:-1], "labels": labels, "shift_labels": labels}


def arguments(job: Job) -> Any:
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="trainer-"),
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=job.num_microbatches,
        max_steps=10**6,
        learning_rate=contestant.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=contestant.WEIGHT_DECAY,
        adam_beta1=contestant.BETAS[0],
        adam_beta2=contestant.BETAS[1],
        adam_epsilon=contestant.EPSILON,
        max_grad_norm=contestant.CLIP_GRAD,
        bf16=job.is_bf16,
        optim="adamw_torch_fused",
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    # --- end


class Timed(TrainerCallback):
    """Tells the driver of every update."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.loss = 0.0

    def on_step_end(self, *_: object, **__: object) -> None:
        loss, self.loss = self.loss, 0.0
        self.turns.step_ended(loss)


class LossKeepingTrainer(Trainer):
    kept: Timed

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self.kept.loss += loss.item()
        return loss


def main() -> None:
    job, turns = contestant.start()
    model = llama.build(job)
    turns.parameters = sum(p.numel() for p in model.parameters())
    callback = Timed(turns)
    trainer = LossKeepingTrainer(model, arguments(job), train_dataset=Sequences(job), callbacks=[callback])
    trainer.kept = callback
    trainer.train()


if __name__ == "__main__":
    main()

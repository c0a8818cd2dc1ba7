"""LitGPT's model in the loop of its own pretrain.py, over Lightning Fabric; options: compile."""

from __future__ import annotations

from typing import Any

import contestant
import lightning
import torch
from contestant import Job
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file


def main() -> None:
    job, turns = contestant.start()
    # --- what its user writes
    fabric = lightning.Fabric(
        accelerator="cpu", devices=1, precision="bf16-mixed" if job.is_bf16 else "32-true"
    )
    model = build(job)
    turns.parameters = sum(p.numel() for p in model.parameters())
    model = fabric.setup(torch.compile(model) if job.options.get("compile") else model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            model.parameters(),
            lr=contestant.LEARNING_RATE,
            betas=contestant.BETAS,
            eps=contestant.EPSILON,
            weight_decay=contestant.WEIGHT_DECAY,
            fused=True,
        )
    )
    for microbatches in contestant.batches(job):
        step_loss = 0.0
        for tokens in microbatches:
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            loss = chunked_cross_entropy(model(inputs), targets, **job.options.get("loss", {}))
            fabric.backward(loss / job.num_microbatches)
            step_loss += loss.item() / job.num_microbatches
        fabric.clip_gradients(model, optimizer, max_norm=contestant.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step_ended(step_loss)


def build(job: Job) -> Any:
    config = Config(
        name="peer",
        block_size=job.seq_length,
        vocab_size=job.vocab_size,
        padded_vocab_size=job.vocab_size,
        n_layer=job.num_layers,
        n_head=job.num_heads,
        n_embd=job.hidden_size,
        intermediate_size=job.ffn_hidden_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    # --- end
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(job.weights))
    model.load_state_dict(weights)
    return model


if __name__ == "__main__":
    main()

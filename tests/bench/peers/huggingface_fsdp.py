"""transformers' Llama under PyTorch's FSDP2."""

from __future__ import annotations

import contestant
import llama
import torch
import torch.distributed as dist
import transformers  # noqa: F401 - before memory counts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def main() -> None:
    job, turns = contestant.start()
    # --- what its user writes
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if job.is_bf16 else MixedPrecisionPolicy()
    model = llama.build(job)
    turns.parameters = sum(p.numel() for p in model.parameters())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
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
        for number, tokens in enumerate(microbatches, 1):
            inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            model.set_requires_gradient_sync(number == len(microbatches))
            loss = model(input_ids=inputs, labels=labels, shift_labels=labels).loss
            (loss / job.num_microbatches).backward()
            step_loss += loss.item() / job.num_microbatches
        torch.nn.utils.clip_grad_norm_(model.parameters(), contestant.CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # --- end
        turns.step_ended(step_loss)


if __name__ == "__main__":
    main()

"""distllm: the engine and pipeline that `distllm train` runs, and its model, from a config."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import contestant
import torch
from contestant import Job

from distllm.config import compose
from distllm.config.schema import Config
from distllm.layout.grid import Grid
from distllm.layout.groups import Groups, create_groups
from distllm.model.build import BuiltModel, build_model
from distllm.runtime import dist, quiet

quiet.silence()


def overrides(job: Job, world_size: int) -> list[str]:
    """What a user writes behind `distllm train`, but for data and run directory."""
    batch = job.micro_batch_size * job.num_microbatches * world_size
    return [
        "model=tiny",
        f"model.num_layers={job.num_layers}",
        f"model.hidden_size={job.hidden_size}",
        f"model.ffn_hidden_size={job.ffn_hidden_size}",
        f"model.num_attention_heads={job.num_heads}",
        f"model.num_query_groups={job.num_heads}",
        f"model.seq_length={job.seq_length}",
        f"tokenizer.vocab_size={job.vocab_size}",
        f"train.micro_batch_size={job.micro_batch_size}",
        f"train.global_batch_size={batch}",
        f"train.precision={job.precision}",
        f"zero.stage={job.options.get('zero_stage', 0)}",
        f"optimizer.weight_decay={contestant.WEIGHT_DECAY}",
        f"optimizer.betas=[{contestant.BETAS[0]},{contestant.BETAS[1]}]",
        f"optimizer.epsilon={contestant.EPSILON}",
        f"optimizer.clip_grad={contestant.CLIP_GRAD}",
        *job.options.get("overrides", []),
    ]


def build(job: Job) -> tuple[Config, Groups, BuiltModel]:
    """The model with the weights that its seed gives, as all contestants start from them."""
    runtime = dist.start(timedelta(minutes=10))
    config = compose.load(compose.parse("train", overrides(job, runtime.world_size)))
    groups = create_groups(Grid(data=runtime.world_size), runtime.timeout)
    return config, groups, build_model(config, job.vocab_size, groups, torch.device("cpu"))


def main() -> None:
    from distllm.engine.create import create_engine
    from distllm.engine.microbatch import Microbatch
    from distllm.objectives import create_objective

    job, turns = contestant.start()
    config, groups, built = build(job)
    turns.parameters = sum(parameter.numel() for parameter in built.places)
    engine = create_engine(built.chunks, built.places, config, groups, create_objective(config))
    for tokens in contestant.batches(job):
        microbatches: list[Any] = [Microbatch(part) for part in tokens]
        turns.step_ended(engine.train_step(microbatches, contestant.LEARNING_RATE).loss)


if __name__ == "__main__":
    main()

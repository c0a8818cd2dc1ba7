"""Memory of one rank, from shapes alone. Pure.

Model states after Rajbhandari et al. 2020 (arXiv:1910.02054, section 3.1), partitioned and padded as
DeepSpeed 0.19.8 does it, with the further gradients that it keeps (plan/gradients.py). Communication buffers
(a few times `zero.bucket_size` elements), layers that stage 3 gathers, fragmentation and the libraries
themselves are not counted. tests/bench/memory.py measures all but the activations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from distllm.config.schema import Config
from distllm.config.stages import Stage, pipeline_stages
from distllm.model.size import tokens_per_chunk
from distllm.plan.activations import (
    microbatches_in_flight,
    recomputed_elements_per_token,
    stage_elements_per_token,
)
from distllm.plan.gradients import BYTES, backward_gradients, host_bytes, update_gradients
from distllm.plan.parameters import Shapes, numel, stage_parameters
from distllm.plan.partition import partition_numel


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak of a step. loss: logits of a chunk of tokens, and the gradients that the forward pass
    computes from them, on the last stage.

    gradients: beside the activations. optimizer_states: fp32 weights beside the working ones, and both
    moments. update_copies: what the optimizer's update holds in gradients above the gradients, activations
    and loss that are there before it. host: optimizer states, their gradients and staging buffers, in host
    memory where `zero.offload_optimizer` puts them; not on the device then.
    """

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    loss: int
    update_copies: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return sum(asdict(self).values()) - self.host


def rank_memory(config: Config, vocab_size: int, dp_size: int, stage_index: int) -> RankMemory:
    """What any rank of a stage needs, under a legal layout with `dp_size` data-parallel ranks."""
    stage = pipeline_stages(config.model.num_layers, config.parallel)[stage_index]
    shapes = stage_parameters(config.model, stage, vocab_size, config.parallel.tensor)
    weights, _, optimizer_states = model_states(config, shapes, dp_size)
    host = 0
    if config.zero.offload_optimizer:
        optimizer_states, host = 0, optimizer_states + host_bytes(config, shapes, dp_size)
    gradients = backward_gradients(config, shapes, dp_size)
    activations = _activations(config, dp_size, stage, stage_index)
    loss = _loss(config, vocab_size) if stage.is_last else 0
    above = update_gradients(config, shapes, dp_size) - (gradients + activations + loss)
    return RankMemory(weights, gradients, optimizer_states, activations, loss, max(0, above), host)


def estimate_memory(config: Config, vocab_size: int, dp_size: int) -> dict[str, int]:
    """Bytes on the device by kind, on the fullest rank."""
    stages = range(config.parallel.pipeline)
    fullest = max((rank_memory(config, vocab_size, dp_size, i) for i in stages), key=lambda m: m.total)
    return {kind.replace("_", " "): size for kind, size in asdict(fullest).items() if kind != "host"}


def model_states(config: Config, shapes: Shapes, dp_size: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of the parameters `shapes` on one rank: the paper's
    formulae with DeepSpeed's padding, without the further gradients that it keeps."""
    stage, is_fp32 = config.zero.stage, config.train.precision == "fp32"
    whole, part = numel(shapes), partition_numel(shapes, stage, dp_size)
    persistent = sum(n for n in map(math.prod, shapes.values()) if n <= config.zero.persistence_threshold)
    weights = part + persistent if stage == 3 else whole
    gradients = part if stage >= 2 else whole
    # Stage 0 in fp32 updates the weights themselves; all others keep an fp32 copy beside the working weights.
    fp32_states = 2 if stage == 0 and is_fp32 else 3
    return (
        BYTES[config.train.precision] * weights,
        BYTES[config.train.gradient_accumulation] * gradients,
        BYTES["fp32"] * fp32_states * part,
    )


def _activations(config: Config, dp_size: int, stage: Stage, stage_index: int) -> int:
    """Bytes of activations in flight."""
    train = config.train
    tokens = train.micro_batch_size * config.model.seq_length
    num_microbatches = train.global_batch_size // (train.micro_batch_size * dp_size)
    kept = stage_elements_per_token(config, stage) * microbatches_in_flight(
        config, stage_index, num_microbatches
    )
    return tokens * BYTES[train.precision] * (math.ceil(kept) + recomputed_elements_per_token(config))


def _loss(config: Config, vocab_size: int) -> int:
    """Bytes of model/loss.py: a chunk's logits in fp32, and in the model's precision where it is another;
    gradients of the hidden states and of the output layer until the backward pass takes them."""
    model, element = config.model, BYTES[config.train.precision]
    tokens = config.train.micro_batch_size * model.seq_length
    num_rows = model.padded_vocab_size(vocab_size) // config.parallel.tensor
    logits = min(tokens, tokens_per_chunk(num_rows)) * num_rows
    bytes_per_logit = BYTES["fp32"] + (element if element != BYTES["fp32"] else 0)
    return logits * bytes_per_logit + (tokens + num_rows) * model.hidden_size * element

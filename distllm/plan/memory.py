"""Memory of one rank, from shapes alone. Pure.

Model states after Rajbhandari et al. 2020 (arXiv:1910.02054, section 3.1), partitioned and padded as
DeepSpeed 0.19.8 does, with the further gradients that it keeps (plan/gradients.py). tests/bench/memory.py
measures all but the activations. What else occupies a device (plan/occupied.py) is counted where
`cluster.device` names one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from distllm.config.schema import Config
from distllm.layout.flat import is_flat
from distllm.layout.grid import Grid
from distllm.model.loss_chunks import tokens_per_chunk
from distllm.optimizers import recipe_of
from distllm.plan.activations import (
    microbatches_in_flight,
    recomputed_elements_per_token,
    stage_elements_per_token,
)
from distllm.plan.gradients import BYTES, backward_gradients, host_bytes, update_gradients
from distllm.plan.held import Held
from distllm.plan.occupied import Occupied, copies_at_update, occupied
from distllm.plan.partition import partition_numel
from distllm.plan.rank_view import RankView, rank_views
from distllm.plan.startup import start_bytes


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak of a step.

    loss: logits of a chunk of tokens, and the gradients that the forward pass computes from them, on the last
        stage.
    gradients: held together with the activations.
    optimizer_states: fp32 copies of the weights, and the optimizer's states of each.
    update_copies: gradient memory of the optimizer's update beyond the gradients, activations and loss before
        it.
    host: optimizer states, their gradients and staging buffers, in host memory where `zero.offload_optimizer`
        puts them; they are then not on the device.
    occupied: what else occupies the device; None where no device is named.
    """

    weights: int
    gradients: int
    optimizer_states: int
    activations: int
    loss: int
    update_copies: int = 0
    host: int = 0
    occupied: Occupied | None = None

    @property
    def on_device(self) -> dict[str, int]:
        """Return bytes on the device by kind."""
        kinds = asdict(self)
        kinds.pop("host")
        kinds |= kinds.pop("occupied") or {}
        return {kind.replace("_", " "): size for kind, size in kinds.items()}

    @property
    def total(self) -> int:
        """Return the total on the device."""
        return sum(self.on_device.values())


def rank_memory(view: RankView) -> RankMemory:
    """Return the memory of any rank of a pipeline stage."""
    config, held, dp_size = view.config, view.held, view.dp_size
    weights, _, optimizer_states = model_states(config, held, dp_size)
    host = 0
    if config.zero.offload_optimizer:
        optimizer_states, host = 0, optimizer_states + host_bytes(config, held, dp_size)
    gradients = backward_gradients(config, held, dp_size)
    activations = _activations(view)
    loss = _loss(view) if view.stage.is_last else 0
    beside = occupied(view) if config.cluster.device else None
    in_backward = gradients + activations + loss + (beside.in_backward if beside else 0)
    in_update = update_gradients(config, held, dp_size) + (copies_at_update(view) if beside else 0)
    above = max(0, in_update - in_backward)
    memory = RankMemory(weights, gradients, optimizer_states, activations, loss, above, host, beside)
    if beside is None:
        return memory
    start = beside.always + start_bytes(config, held, dp_size, weights, optimizer_states)
    return replace(memory, occupied=replace(beside, start_up=max(0, start - memory.total)))


def estimate_memory(config: Config, vocab_size: int, grid: Grid) -> dict[str, int]:
    """Return bytes on the device by kind, on the rank that needs most."""
    fullest = max(map(rank_memory, rank_views(config, vocab_size, grid)), key=lambda memory: memory.total)
    return fullest.on_device


def model_states(config: Config, held: Held, dp_size: int) -> tuple[int, int, int]:
    """Return bytes of weights, gradients and optimizer states of the parameters `held` on one rank.

    The paper's formulae with DeepSpeed's padding, without the further gradients that it keeps.
    """
    zero_stage, is_fp32 = config.zero.stage, config.train.precision == "fp32"
    whole, part = held.numel, partition_numel(config, held, dp_size)
    threshold = config.zero.persistence_threshold
    persistent = sum(n for n in map(math.prod, held.shapes.values()) if n <= threshold)
    weights = part + persistent if zero_stage == 3 else whole
    gradients = part if zero_stage >= 2 else whole
    fp32_states = recipe_of(config.optimizer).tensors_per_parameter
    if is_flat(config.zero) and is_fp32:
        fp32_states -= 1  # updates the weights themselves; DeepSpeed keeps a copy beside the working ones
    return (
        BYTES[config.train.precision] * weights,
        BYTES[config.train.gradient_accumulation] * gradients,
        BYTES["fp32"] * fp32_states * part,
    )


def _activations(view: RankView) -> int:
    """Return bytes of activations in flight."""
    config = view.config
    kept = stage_elements_per_token(config, view.stage) * microbatches_in_flight(
        config, view.stage_index, view.num_microbatches
    )
    element = BYTES[config.train.precision]
    return view.tokens_per_microbatch * element * (math.ceil(kept) + recomputed_elements_per_token(config))


def _loss(view: RankView) -> int:
    """Return the bytes of model/loss.py.

    A chunk's logits in fp32, and in the model's precision where that differs; gradients of the hidden states
    and of the output layer until the backward pass uses them.
    """
    element, tokens = BYTES[view.config.train.precision], view.tokens_per_microbatch
    num_rows = view.padded_vocab_size // view.grid.tensor
    logits = min(tokens, tokens_per_chunk(num_rows)) * num_rows
    bytes_per_logit = BYTES["fp32"] + (element if element != BYTES["fp32"] else 0)
    return logits * bytes_per_logit + (tokens + num_rows) * view.config.model.hidden_size * element

"""Activations that the forward pass keeps for the backward pass, by a family's figures per layer. Pure."""

from __future__ import annotations

from distllm.config.schema import Config
from distllm.config.stages import Stage, microbatch_group_size
from distllm.model.families import family_of


def stage_elements_per_token(config: Config, stage: Stage) -> int:
    """Return elements per token of a microbatch that the layers of `stage` keep on a rank until backward."""
    parallel = config.parallel
    layer = family_of(config.model).activations(config.model, parallel.tensor, parallel.sequence)
    layer_input = config.model.hidden_size // (parallel.tensor if parallel.sequence else 1)
    recomputed = num_recomputed_layers(config, stage)
    # The output that an interleaved chunk sends is not freed (model/spec.py); the last chunk's output has no
    # next stage.
    sent = (len(stage.chunks) - stage.is_last) * layer_input if parallel.virtual_pipeline > 1 else 0
    return recomputed * layer_input + (len(stage.layers) - recomputed) * layer + sent


def num_recomputed_layers(config: Config, stage: Stage) -> int:
    """Return the number of the stage's layers whose forward pass is repeated before their backward pass."""
    if config.recompute.granularity != "full":
        return 0
    return sum(min(config.recompute.num_layers or len(chunk), len(chunk)) for chunk in stage.chunks)


def recomputed_elements_per_token(config: Config) -> int:
    """Return elements per token of the one layer being recomputed, in addition to all that is kept."""
    if config.recompute.granularity != "full":
        return 0
    parallel = config.parallel
    return family_of(config.model).activations(config.model, parallel.tensor, parallel.sequence)


def microbatches_in_flight(config: Config, stage_index: int, num_microbatches: int) -> float:
    """Return the most microbatches whose activations a stage holds at once; a chunk counts as a fraction.

    1F1B: one per stage from this one on (Narayanan et al. 2021, arXiv:2104.04473, section 2.2). Interleaved:
    the warm-up of Megatron Core's schedule and one more; p * (1 + (p - 1) / (p * v)) on the first of p stages
    with v chunks (arXiv:2205.05198, section 4.2.3).
    """
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    after = pipeline - stage_index - 1
    if chunks == 1:
        return min(after + 1, num_microbatches)
    group = microbatch_group_size(num_microbatches, pipeline)
    chunks_in_flight = 2 * after + (chunks - 1) * group + 1
    return min(chunks_in_flight, num_microbatches * chunks) / chunks

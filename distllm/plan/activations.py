"""What the forward pass keeps for the backward pass. Pure.

Korthikanti et al. 2022 (arXiv:2205.05198), for our layers: without the score matrix, which the attention
kernel recomputes, and without dropout masks.
"""

from __future__ import annotations

from distllm.config.schema import Config, Model
from distllm.config.stages import Stage, microbatch_group_size


def layer_elements_per_token(model: Model, tensor: int = 1, sequence: bool = False) -> int:
    """Elements per token that one layer keeps on a tensor-parallel rank.

    What lies between the column- and the row-parallel projections is cut by tensor parallelism, what lies
    outside by sequence parallelism only. Recomputing the attention core (`selective`) changes nothing: its
    inputs and its output are kept by its neighbours anyway, and the kernel's own part is 1 fp32 per head.
    Nor does attention inside documents, which makes no mask; but on a CPU, which runs them one by one, the
    context is kept twice.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.resolved_head_dim
    keys = model.num_query_groups * model.resolved_head_dim
    # Input and output of both; kernels that are not fused (RMSNorm's on CPUs) keep one more each.
    norms = 4 * hidden
    # The projection, whole, since the values are a view of it; the context; rotated queries and keys.
    attention = (queries + 2 * keys) + queries + (queries + keys if model.position_embedding == "rope" else 0)
    # Both projections, activated gate, product; or, without a gate, before and after the activation.
    feed_forward = 4 * ffn if model.activation == "swiglu" else 2 * ffn
    return norms // (tensor if sequence else 1) + (attention + feed_forward) // tensor


def stage_elements_per_token(config: Config, stage: Stage) -> int:
    """Elements per token of one microbatch that all layers of `stage` keep on a rank until their backward."""
    parallel, recompute = config.parallel, config.recompute
    layer = layer_elements_per_token(config.model, parallel.tensor, parallel.sequence)
    layer_input = config.model.hidden_size // (parallel.tensor if parallel.sequence else 1)
    recomputed = 0
    if recompute.granularity == "full":
        recomputed = sum(min(recompute.num_layers or len(chunk), len(chunk)) for chunk in stage.chunks)
    # What an interleaved chunk sends is not freed (model/spec.py); the last one's output has no next stage.
    sent = (len(stage.chunks) - stage.is_last) * layer_input if parallel.virtual_pipeline > 1 else 0
    return recomputed * layer_input + (len(stage.layers) - recomputed) * layer + sent


def recomputed_elements_per_token(config: Config) -> int:
    """Elements per token of the one layer that is being recomputed, beside all that is kept."""
    if config.recompute.granularity != "full":
        return 0
    return layer_elements_per_token(config.model, config.parallel.tensor, config.parallel.sequence)


def microbatches_in_flight(config: Config, stage_index: int, num_microbatches: int) -> float:
    """Microbatches whose activations a stage holds at once, at most; a chunk counts as its share of a stage.

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

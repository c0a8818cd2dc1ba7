"""Memory of one rank, estimated from shapes alone. Pure."""

from __future__ import annotations

from distllm.config.schema import Config, Model
from distllm.model.size import count_parameters

FP32_BYTES = 4
ACTIVATION_BYTES = {"fp32": 4, "bf16": 2}


def estimate_memory(config: Config, vocab_size: int, dp_size: int) -> dict[str, int]:
    """Bytes by kind on the fullest rank.

    Model states after Rajbhandari et al. 2020 (arXiv:1910.02054, section 3.1), activations of one microbatch
    as the layers save them for the backward pass.

    Without communication buffers, fragmentation and the libraries themselves.
    """
    parameters = count_parameters(config.model, vocab_size).total
    stage, is_fp32 = config.zero.stage, config.train.precision == "fp32"
    weight_bytes = FP32_BYTES if is_fp32 else ACTIVATION_BYTES["bf16"]
    # Stage 0 in fp32 updates the weights themselves; all others keep an fp32 copy beside the working weights.
    master_bytes = 0 if stage == 0 and is_fp32 else FP32_BYTES
    tokens = config.train.micro_batch_size * config.model.seq_length
    activation_bytes = ACTIVATION_BYTES[config.train.precision]
    return {
        "weights": weight_bytes * parameters // (dp_size if stage >= 3 else 1),
        "gradients": FP32_BYTES * parameters // (dp_size if stage >= 2 else 1),
        "optimizer states": (master_bytes + 2 * FP32_BYTES) * parameters // (dp_size if stage >= 1 else 1),
        "activations": tokens * activation_bytes * activation_elements_per_token(config.model),
        # Logits and their probabilities live together while the loss is differentiated, in fp32.
        "logits": tokens * FP32_BYTES * 2 * vocab_size,
    }


def activation_elements_per_token(model: Model) -> int:
    """Elements per token that the forward pass of all layers keeps for the backward pass.

    Korthikanti et al. 2022 (arXiv:2205.05198, section 4) without the score matrix, which the attention
    kernel recomputes, and without dropout masks.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.resolved_head_dim
    keys = model.num_query_groups * model.resolved_head_dim
    # Input and output of both; kernels that are not fused (RMSNorm's on CPUs) keep one more each.
    norms = 4 * hidden
    # The projection, whole, since the values are a view of it; the context; rotated queries and keys.
    attention = (queries + 2 * keys) + queries + (queries + keys if model.position_embedding == "rope" else 0)
    # Both projections, activated gate, a copy of the other half (Megatron adds an offset to it), product; or,
    # without a gate, before and after the activation.
    feed_forward = 5 * ffn if model.activation == "swiglu" else 2 * ffn
    return model.num_layers * (norms + attention + feed_forward)

"""The job's model as transformers has it, with the weights that all contestants start from."""

from __future__ import annotations

from typing import Any

from contestant import Job


def config(job: Job) -> Any:
    from transformers import LlamaConfig

    # --- what its user writes
    return LlamaConfig(
        vocab_size=job.vocab_size,
        hidden_size=job.hidden_size,
        intermediate_size=job.ffn_hidden_size,
        num_hidden_layers=job.num_layers,
        num_attention_heads=job.num_heads,
        num_key_value_heads=job.num_heads,
        max_position_embeddings=job.seq_length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    # --- end


def build(job: Job) -> Any:
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config(job))
    model.load_state_dict(load_file(job.weights))
    return model.train()

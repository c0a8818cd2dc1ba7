"""The model of this rank, built and initialised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import nn

from distllm.config.schema import Config
from distllm.layout.groups import Groups
from distllm.layout.place import Place
from distllm.model.init import initialize_weights
from distllm.model.places import parameter_places
from distllm.model.spec import block_spec, transformer_config


@dataclass(frozen=True)
class BuiltModel:
    """`module`: this rank's part of the model. `places`: where each of its parameters lies in the whole."""

    module: GPTModel
    places: dict[nn.Parameter, Place]


def build_model(config: Config, vocab_size: int, groups: Groups, device: torch.device) -> BuiltModel:
    """Build this rank's part of the model on `device` and give it its initial weights.

    `module(tokens, positions, None, labels=labels)` takes [batch, seq] integers and returns the loss of every
    token, [batch, seq] in fp32; without labels the logits, [batch, seq, vocab/tp].
    """
    model = config.model
    # Megatron Core wants its random states to exist, even where nothing is drawn from them.
    model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    megatron_config = transformer_config(model, config.parallel, config.train.precision, device)
    with torch.device(device):
        module = GPTModel(
            megatron_config,
            block_spec(model, megatron_config),
            vocab_size=vocab_size,
            max_sequence_length=model.seq_length,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            position_embedding_type="rope" if model.position_embedding == "rope" else "learned_absolute",
            rotary_base=model.rope_base,
            share_embeddings_and_output_weights=model.tie_embeddings,
            parallel_output=True,
            pg_collection=groups.megatron,
        )
    places = parameter_places(module, groups)
    initialize_weights(places, model, config.train.seed)
    return BuiltModel(module, places)

"""The model of this rank, built and initialised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from distllm.config.schema import Config
from distllm.layout.groups import Groups
from distllm.layout.place import Place
from distllm.model.gpt import GPT
from distllm.model.init import initialize_weights
from distllm.model.kernels import compiled, use_kernels
from distllm.model.sharding import parameter_places
from distllm.model.spec import block_spec, transformer_config


@dataclass(frozen=True)
class BuiltModel:
    """chunks: this rank's parts of the model, one unless the pipeline is interleaved. places: where each of
    their parameters lies in the whole."""

    chunks: list[nn.Module]
    places: dict[nn.Parameter, Place]


def build_model(
    config: Config,
    vocab_size: int,
    groups: Groups,
    device: torch.device,
    warn: Callable[[str], None] = warnings.warn,
) -> BuiltModel:
    """Build this rank's part of the model on `device` and give it its initial weights.

    warn: is told, in the first step, what `train.compile` asks for and cannot be compiled.

    A chunk takes tokens and positions, both [batch, seq], and where documents begin in them, [num_documents +
    1] int32, or None: attention then stays inside documents, not sequences. The last chunk returns a loss
    where labels are given (see GPT), else logits, [batch, seq, padded_vocab/tp]; other chunks return
    activations, [seq (/tp), batch, hidden].
    """
    # Megatron Core wants its random states to exist, even where nothing is drawn from them.
    model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    megatron_config = transformer_config(config, device)
    places: dict[nn.Parameter, Place] = {}
    chunks: list[nn.Module] = []
    for chunk in range(groups.num_chunks):
        with torch.device(device):
            module = _build_chunk(config, megatron_config, vocab_size, groups, chunk)
        places |= parameter_places(module, groups)
        chunks.append(module)
    initialize_weights(places, config.model, config.train.seed)
    if config.train.compile:
        kernels = compiled(warn)
        for chunk_module in chunks:
            use_kernels(chunk_module, kernels)
    return BuiltModel(chunks, places)


def _build_chunk(
    config: Config, megatron_config: TransformerConfig, vocab_size: int, groups: Groups, chunk: int
) -> GPT:
    model = config.model
    virtual_stage = chunk if groups.num_chunks > 1 else None
    return GPT(
        megatron_config,
        block_spec(model, megatron_config, virtual_stage),
        vocab_size=vocab_size,
        padded_vocab_size=model.padded_vocab_size(vocab_size),
        max_sequence_length=model.seq_length,
        pre_process=groups.is_first_chunk(chunk),
        post_process=groups.is_last_chunk(chunk),
        position_embedding_type="rope" if model.position_embedding == "rope" else "learned_absolute",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tie_embeddings,
        parallel_output=True,
        pg_collection=groups.megatron,
        vp_stage=virtual_stage,
    )

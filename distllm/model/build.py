"""Build and initialise the model of this rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from distllm.config.schema import Config
from distllm.config.stages import pipeline_stages
from distllm.layout.groups import Groups
from distllm.layout.parameter import WORD_EMBEDDINGS, Parameter
from distllm.layout.place import Place
from distllm.model.families import family_of
from distllm.model.gpt import GPT
from distllm.model.init import initialize_weights
from distllm.model.kernels import compiled, use_kernels
from distllm.model.parameters import parameters_of
from distllm.model.sharding import match_table, place_of
from distllm.model.spec import block_spec, transformer_config


@dataclass(frozen=True)
class BuiltModel:
    """The model of this rank.

    chunks: this rank's parts of the model, one unless the pipeline is interleaved.
    places: the place of each of their parameters in the whole.
    """

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

    warn: called in the first step with what `train.compile` requests and cannot be compiled.

    A chunk takes tokens and positions, both [batch, seq], and where documents begin in them, [num_documents +
    1] int32, or None: attention then stays inside documents, not sequences. The last chunk returns a loss
    where labels are given (see GPT), else logits, [batch, seq, padded_vocab/tp]; other chunks return
    activations, [seq (/tp), batch, hidden].
    """
    # Megatron Core requires its random states, even where nothing is drawn from them.
    model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    megatron_config = transformer_config(config, device)
    num_rows = config.model.padded_vocab_size(vocab_size)
    table = {entry.name: entry for entry in parameters_of(config.model, num_rows)}
    entries: dict[nn.Parameter, Parameter] = {}
    places: dict[nn.Parameter, Place] = {}
    chunks: list[nn.Module] = []
    for chunk in range(groups.num_chunks):
        with torch.device(device):
            module = _build_chunk(config, megatron_config, vocab_size, groups, chunk)
        for parameter, entry in match_table(module, table, groups).items():
            is_tied_copy = entry.name == WORD_EMBEDDINGS and not groups.is_first_chunk(chunk)
            entries[parameter], places[parameter] = entry, place_of(entry, groups, is_tied_copy)
        chunks.append(module)
    initialize_weights(entries, places, config.train.seed)
    if config.train.compile:
        kernels = compiled(warn)
        for chunk_module in chunks:
            use_kernels(chunk_module, kernels)
    return BuiltModel(chunks, places)


def _build_chunk(
    config: Config, megatron_config: TransformerConfig, vocab_size: int, groups: Groups, chunk: int
) -> GPT:
    model = config.model
    stage = pipeline_stages(model.num_layers, config.parallel)[groups.coordinates.pipeline]
    virtual_stage = chunk if groups.num_chunks > 1 else None
    return GPT(
        megatron_config,
        block_spec(model, stage.chunks[chunk]),
        vocab_size=vocab_size,
        padded_vocab_size=model.padded_vocab_size(vocab_size),
        pre_process=groups.is_first_chunk(chunk),
        post_process=groups.is_last_chunk(chunk),
        **family_of(model).gpt_arguments(model),
        parallel_output=True,
        pg_collection=groups.megatron,
        vp_stage=virtual_stage,
    )

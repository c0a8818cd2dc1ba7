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
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.layout.place import Place
from distllm.model.families import family_of
from distllm.model.gpt import GPT
from distllm.model.init import initialize
from distllm.model.kernels import compiled, use_kernels
from distllm.model.materialize import materialize
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
    *,
    hold: Callable[[nn.Parameter], None] = lambda parameter: None,
    draws: bool = True,
) -> BuiltModel:
    """Build this rank's part of the model on `device`.

    It is built without memory; then each parameter gets its memory and its values before the next.

    warn: called in the first step with what `train.compile` requests and cannot be compiled.
    hold: called with each parameter once it has its values: ZeRO-3 keeps a part of it.
    draws: give the parameters their initial values; else they are arbitrary, since a checkpoint follows.

    A chunk takes tokens and positions, both [batch, seq], and where documents begin in them, [num_documents +
    1] int32, or None: attention then stays inside documents, not sequences. The last chunk returns a loss
    where labels are given (see GPT), else logits, [batch, seq, padded_vocab/tp]; other chunks return
    activations, [seq (/tp), batch, hidden].
    """
    # Megatron Core requires its random states, even where nothing is drawn from them.
    tensor_rank = groups.coordinates.tensor
    model_parallel_cuda_manual_seed(
        config.train.seed, force_reset_rng=True, tp_rank=tensor_rank, ep_rank=0, etp_rank=tensor_rank
    )
    megatron_config = transformer_config(config)
    num_rows = config.model.padded_vocab_size(vocab_size)
    table = {entry.name: entry for entry in parameters_of(config.model, num_rows)}
    places: dict[nn.Parameter, Place] = {}
    chunks: list[nn.Module] = []
    for chunk in range(groups.num_chunks):
        with torch.device("meta"):
            module = _build_chunk(config, megatron_config, vocab_size, groups, chunk)
        for name, entry in match_table(module, table, groups).items():
            is_tied_copy = entry.name == WORD_EMBEDDINGS and not groups.is_first_chunk(chunk)
            place = place_of(entry, groups, is_tied_copy)
            parameter = materialize(module, name, device, megatron_config.params_dtype)
            if draws and device.type != "meta":
                initialize(parameter, entry, place, config.train.seed)
            hold(parameter)
            places[parameter] = place
        chunks.append(module)
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

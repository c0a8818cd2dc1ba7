"""Convert our config to Megatron Core's: the transformer config and the specification of a rank's layers."""

from __future__ import annotations

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from distllm.config.schema import Config, Model, Recompute
from distllm.layout.dtypes import DTYPES
from distllm.model.families import family_of


def transformer_config(config: Config) -> TransformerConfig:
    """Return Megatron Core's config of the model; every fusion that needs its CUDA extensions is off."""
    model, parallel, precision = config.model, config.parallel, config.train.precision
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        **family_of(model).transformer_arguments(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline
        if parallel.virtual_pipeline > 1
        else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        account_for_embedding_in_pipeline_split=parallel.embedding_as_layer,
        account_for_loss_in_pipeline_split=parallel.loss_as_layer,
        # Batched sends carry no tag: with two stages the previous and the next rank are the same, and
        # interleaved chunks receive each other's activations on gloo, without any error.
        batch_p2p_comm=False,
        # Megatron has it for interleaved stages only. If it frees outputs, it frees one while that is still
        # being sent: on gloo other activations arrive, again without any error.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        deallocate_pipeline_outputs=parallel.virtual_pipeline == 1,
        **_recompute_arguments(config.recompute),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # Weights come from init.py, equal under every layout. Megatron does not even allocate: what it would
        # allocate on a GPU by its number, it then allocates where torch does by default (build.py: nowhere).
        perform_initialization=False,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _recompute_arguments(recompute: Recompute) -> dict[str, object]:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    method = {"recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute.num_layers is not None:
        method = {"recompute_method": "block", "recompute_num_layers": recompute.num_layers}
    return {"recompute_granularity": "full", **method}


def block_spec(model: Model, layers_of_chunk: range) -> TransformerBlockSubmodules:
    """Return the layers of a model chunk and the final norm (ours too, hence not a layer spec)."""
    family = family_of(model)
    layers = [family.layer_spec(model, number) for number in layers_of_chunk]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=family.final_norm(model))

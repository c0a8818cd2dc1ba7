"""From our config to Megatron Core's: the transformer config and the specification of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from distllm.config.schema import Config, Model, Recompute
from distllm.model.attention import CausalAttention
from distllm.model.layers import Attention, FeedForward, RowParallelLinearWithBias
from distllm.model.norm import LayerNorm, RMSNorm

NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
MEGATRON_NORM_NAMES = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")  # the form that GPT-2 was trained with


ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """Megatron Core's view of the model; every fusion that needs its CUDA extensions is off."""
    model, parallel, precision = config.model, config.parallel, config.train.precision
    dtype = DTYPES[precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.resolved_head_dim,
        normalization=MEGATRON_NORM_NAMES[model.normalization],
        layernorm_epsilon=model.norm_epsilon,
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.activation == "swiglu",
        add_bias_linear=model.bias,
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
        # Batched sends name no message: with two stages the previous and the next rank are the same, and
        # interleaved chunks take each other's activations on gloo, without any error.
        batch_p2p_comm=False,
        # Megatron has it for interleaved stages only. It frees an output while that is still being sent, if
        # told to free outputs: on gloo other activations arrive, again without any error.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        deallocate_pipeline_outputs=parallel.virtual_pipeline == 1,
        **_recompute_arguments(config.recompute),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        # Weights come from init.py, equal under every layout; Megatron only allocates.
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
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


def block_spec(
    model: Model, config: TransformerConfig, virtual_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank and the final norm (ours too, hence a block spec and not a layer spec)."""
    norm = NORMS[model.normalization]
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=Attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CausalAttention,
                    linear_proj=RowParallelLinearWithBias,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=FeedForward,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)

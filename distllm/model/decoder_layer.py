"""The layer of families/decoder.py as Megatron Core builds it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from distllm.config.schema import Model
from distllm.model.attention import CausalAttention
from distllm.model.layers import Attention, FeedForward, RowParallelLinearWithBias
from distllm.model.norm import LayerNorm, RMSNorm

NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")  # the form that GPT-2 was trained with


ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh}


def layer_spec(model: Model) -> ModuleSpec:
    norm = NORMS[model.normalization]
    return ModuleSpec(
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

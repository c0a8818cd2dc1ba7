"""The transformer from scratch in plain PyTorch: what ours is compared with.

Written from the papers with the simplest operations, in float64, with nothing of distllm or Megatron Core.
Weights come by canonical name. Shapes: B batch, T sequence, H heads, G query groups, D head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    groups: int
    head_dim: int
    norm: str
    norm_epsilon: float
    positions: str
    rope_base: float
    activation: str
    tied: bool
    vocab_size: int  # rows of the embedding beyond are padding


def logits(weights: dict[str, Tensor], tokens: Tensor, shape: Shape) -> Tensor:
    """[B, T] integers -> [B, T, vocab]."""
    embedding = weights["embedding.word_embeddings.weight"]
    x = embedding[tokens]  # [B, T, hidden]
    if shape.positions == "learned":
        x = x + weights["embedding.position_embeddings.weight"][: tokens.size(1)]
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = x + attention(normalize(x, w, "input_layernorm", shape), w, shape)
        x = x + feed_forward(normalize(x, w, "pre_mlp_layernorm", shape), w, shape)
    final = {name.removeprefix("decoder."): value for name, value in weights.items()}
    x = normalize(x, final, "final_layernorm", shape)
    output = embedding if shape.tied else weights["output_layer.weight"]
    return x @ output[: shape.vocab_size].T


def loss(weights: dict[str, Tensor], tokens: Tensor, shape: Shape) -> Tensor:
    """Mean negative log-likelihood of tokens[:, 1:] given what is before each."""
    log_probabilities = torch.log_softmax(logits(weights, tokens[:, :-1], shape), dim=-1)
    return -log_probabilities.gather(-1, tokens[:, 1:, None]).mean()


def normalize(x: Tensor, w: dict[str, Tensor], name: str, shape: Shape) -> Tensor:
    if shape.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.norm_epsilon) * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + shape.norm_epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x: Tensor, w: dict[str, Tensor], shape: Shape) -> Tensor:
    batch, seq, _ = x.shape
    per_group = shape.heads // shape.groups
    qkv = linear(x, w, "self_attention.linear_qkv")
    # Rows are stacked group by group: the group's queries, then its key, then its value.
    qkv = qkv.view(batch, seq, shape.groups, per_group + 2, shape.head_dim)
    q = qkv[:, :, :, :per_group].reshape(batch, seq, shape.heads, shape.head_dim)
    k, v = qkv[:, :, :, per_group], qkv[:, :, :, per_group + 1]  # [B, T, G, D]
    if shape.positions == "rope":
        q, k = rotate(q, shape.rope_base), rotate(k, shape.rope_base)
    outputs = []
    for head in range(shape.heads):
        group = head // per_group
        scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / math.sqrt(shape.head_dim)  # [B, T, T]
        future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        outputs.append(torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v[:, :, group])
    return linear(torch.cat(outputs, -1), w, "self_attention.linear_proj")


def rotate(x: Tensor, base: float) -> Tensor:
    """RoPE (arXiv:2104.09864), the halves of a head paired: [B, T, heads, D] -> the same."""
    seq, width = x.size(1), x.size(-1)
    frequencies = base ** (-torch.arange(0, width, 2, dtype=x.dtype) / width)
    angles = torch.arange(seq, dtype=x.dtype)[:, None] * frequencies  # [T, D/2]
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def feed_forward(x: Tensor, w: dict[str, Tensor], shape: Shape) -> Tensor:
    inner = linear(x, w, "mlp.linear_fc1")
    if shape.activation == "swiglu":
        gate, up = inner.chunk(2, -1)
        inner = gate * torch.sigmoid(gate) * up
    elif shape.activation == "gelu":
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    else:
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return linear(inner, w, "mlp.linear_fc2")


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

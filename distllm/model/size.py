"""Arithmetic on the shape of a model: parameters, floating-point operations, memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from distllm.config.schema import Model

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB in fp32


@dataclass(frozen=True)
class ParameterCount:
    """embedding: token and position tables. layers: all layers and the final norm. output: the projection to
    the vocabulary, 0 where it is tied to the embedding."""

    embedding: int
    layers: int
    output: int

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.output


def count_parameters(model: Model, vocab_size: int) -> ParameterCount:
    """Parameters of the whole model, from its shape alone."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query_width = model.num_attention_heads * model.resolved_head_dim
    key_value_width = 2 * model.num_query_groups * model.resolved_head_dim
    bias = 1 if model.bias else 0
    ffn_in = 2 * ffn if model.activation == "swiglu" else ffn
    norm = 2 * hidden if model.normalization == "layernorm" else hidden
    layer = (
        (hidden + bias) * (query_width + key_value_width)  # query, key and value projections
        + query_width * hidden  # attention's output projection
        + (hidden + bias) * ffn_in
        + ffn * hidden
        + 2 * bias * hidden  # biases of the two projections back into the residual stream
        + 2 * norm
    )
    learned_positions = model.seq_length * hidden if model.position_embedding == "learned" else 0
    return ParameterCount(
        embedding=vocab_size * hidden + learned_positions,
        layers=model.num_layers * layer + norm,
        output=0 if model.tie_embeddings else vocab_size * hidden,
    )


def flops_per_token(model: Model, vocab_size: int) -> float:
    """Floating-point operations of forward and backward pass for one token.

    6 per parameter that multiplies (embedding look-ups do not, a tied output projection does) and
    12 * layers * heads * head_dim * seq for the attention scores, not halved for the causal mask, nor less
    where attention stays inside documents: the convention of PaLM (arXiv:2204.02311, appendix B), in which
    most figures are published.
    """
    count = count_parameters(model, vocab_size)
    multiplying = count.layers + vocab_size * model.hidden_size
    attention_width = model.num_attention_heads * model.resolved_head_dim
    return 6.0 * multiplying + 12.0 * model.num_layers * attention_width * model.seq_length


def tokens_per_chunk(num_rows: int, logits_per_chunk: int = LOGITS_PER_CHUNK) -> int:
    """Tokens whose logits for `num_rows` rows of the output layer are computed at once (model/loss.py)."""
    return max(1024, logits_per_chunk // num_rows)  # fewer rows would slow the products down


def chunks_of_tokens(num_tokens: int, num_rows: int) -> int:
    """Chunks in which the loss of `num_tokens` is computed."""
    return -(-num_tokens // tokens_per_chunk(num_rows))

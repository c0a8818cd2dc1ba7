"""The table of a model's parameters, assembled from what its family defines for each part. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from distllm.config.schema import Model
from distllm.config.stages import Stage
from distllm.layout.parameter import Parameter
from distllm.model.families import family_of

Table = dict[str, Parameter]  # by canonical name, in the model's order, by which ZeRO cuts


@lru_cache(maxsize=32)
def parameters_of(model: Model, num_rows: int) -> tuple[Parameter, ...]:
    """Return every parameter of the whole model. num_rows: of vocabulary tables."""
    family = family_of(model)
    layers = (p for number in range(model.num_layers) for p in family.layer(model, number))
    return (*family.embedding(model, num_rows), *layers, *family.head(model, num_rows))


def stage_parameters(model: Model, stage: Stage, num_rows: int) -> Table:
    """Return the whole parameters of which the ranks of a pipeline stage hold parts.

    A tied output projection on a last stage that is not the first is a copy, under the embedding's name.
    """
    family = family_of(model)
    embedding = family.embedding(model, num_rows)
    held: list[Parameter] = list(embedding) if stage.is_first else []
    for number in stage.layers:
        held += family.layer(model, number)
    if stage.is_last:
        held += family.head(model, num_rows)
        if model.tie_embeddings and not stage.is_first:
            held.append(tied_table(embedding))
    return {parameter.name: parameter for parameter in held}


def tied_table(embedding: list[Parameter]) -> Parameter:
    """Return the table that is also the output projection where that is tied."""
    return next(parameter for parameter in embedding if parameter.rows == "vocabulary")


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    embedding: token and position tables.
    layers: all layers and the final norm.
    output: the projection to the vocabulary, 0 where it is tied to the embedding.
    """

    embedding: int
    layers: int
    output: int

    @property
    def total(self) -> int:
        return self.embedding + self.layers + self.output


def count_parameters(model: Model, vocab_size: int) -> ParameterCount:
    """Count parameters of the whole model, from its table; without padding of the vocabulary."""
    family = family_of(model)
    embedding = sum(p.numel for p in family.embedding(model, vocab_size))
    output = sum(p.numel for p in family.head(model, vocab_size) if p.rows == "vocabulary")
    total = sum(p.numel for p in parameters_of(model, vocab_size))
    return ParameterCount(embedding, total - embedding - output, output)


def flops_per_token(model: Model, vocab_size: int) -> float:
    """Return floating-point operations of forward and backward pass for one token, as the family counts."""
    return family_of(model).flops_per_token(model, vocab_size)

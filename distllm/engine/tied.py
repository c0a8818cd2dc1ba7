"""The tied embedding under pipeline parallelism: one tensor of the model that lives on two stages."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from distllm.layout.groups import Groups
from distllm.layout.place import Place

EMBEDDING = "embedding.word_embeddings.weight"


def tied_copy(places: Mapping[nn.Parameter, Place], groups: Groups, is_tied: bool) -> nn.Parameter | None:
    """This rank's copy of the tied embedding, whose gradient the first and the last stage must add up.

    None where nothing is to be added: untied, a single stage, or a stage in between.
    """
    if not is_tied or groups.grid.pipeline == 1 or groups.embedding is None:
        return None
    return next(parameter for parameter, place in places.items() if place.name == EMBEDDING)

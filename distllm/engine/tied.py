"""The tied embedding under pipeline parallelism: one parameter of the model with copies on two stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.layout.place import Place


def tied_copy(places: Mapping[nn.Parameter, Place], groups: Groups, is_tied: bool) -> nn.Parameter | None:
    """Return this rank's copy of the tied embedding, whose gradients the first and last stage must add up.

    None if there is nothing to add: the embedding is not tied, there is a single pipeline stage, or this is a
    stage in between.
    """
    if not is_tied or groups.grid.pipeline == 1 or groups.embedding is None:
        return None
    return next(parameter for parameter, place in places.items() if place.name == WORD_EMBEDDINGS)


def copy_from_first_stage(
    place: Place,
    fragments: Sequence[Fragment],
    states: Mapping[str, torch.dtype],
    *,
    is_split: bool,
    groups: Groups,
    device: torch.device,
) -> None:
    """Copy weights and optimizer states of a tied embedding from the first stage to the last.

    Collective over the first and the last stage.

    place: of this rank's copy.
    fragments: what this rank holds of it; overwritten on the last stage.
    states: names and dtypes of the tensors of a fragment, also on a rank that has no fragment.
    is_split: whether each element lies on one data-parallel rank only, instead of on all.

    Equal gradients give both copies equal updates, except for the last bit: the copies lie at different
    offsets in flat buffers, and vectorised CPU kernels round the ends of a buffer differently. A checkpoint
    holds the first stage's copy, so without this a resumed run would differ in that bit from one that was not
    interrupted.
    """
    first_rank = dist.get_process_group_ranks(groups.embedding)[0]
    for state, dtype in sorted(states.items()):
        whole = torch.zeros(math.prod(place.local_shape), dtype=dtype, device=device)
        for fragment in fragments:
            whole[fragment.start : fragment.stop] = fragment.tensors[state]
        if is_split:
            dist.all_reduce(whole, group=groups.gradient(place).group)
        dist.broadcast(whole, src=first_rank, group=groups.embedding)
        if groups.is_last_stage:
            for fragment in fragments:
                fragment.tensors[state].copy_(whole[fragment.start : fragment.stop])

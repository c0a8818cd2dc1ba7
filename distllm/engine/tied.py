"""The tied embedding under pipeline parallelism: one tensor of the model that lives on two stages."""

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
    """This rank's copy of the tied embedding, whose gradient the first and the last stage must add up.

    None where nothing is to be added: untied, a single stage, or a stage in between.
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
    """Make the last stage's weights and optimizer states of a tied embedding those of the first stage.

    place: of this rank's copy. fragments: what this rank holds of it, overwritten on the last stage. states:
    all that fragments hold, also where there are none. is_split: each element lies on one data-parallel rank,
    instead of on all. Collective over the first and the last stage.

    Equal gradients give both copies equal updates, but for the last bit: the copies lie elsewhere in flat
    buffers, and vectorised CPU kernels round the ends of a buffer differently. A checkpoint holds the first
    stage's copy, so without this a resumed pipeline would differ in that bit from one that went on.
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

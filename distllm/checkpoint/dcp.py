"""Fragments in and out of `torch.distributed.checkpoint` (DCP), torch 2.11 to 2.13.

A file holds global tensors, "<state>/<canonical name>" with state "weight" or the optimizer's own word, cut
into the boxes that ranks happened to hold. Plain DCP tools read it. Traps of DCP, each met below: its look-up
takes tensors only, it removes duplicates that should be errors, its load ignores holes and casts silently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from distllm.config.problems import user_error
from distllm.layout.fragment import Fragment
from distllm.layout.place import Box, Place, Shape


@dataclass
class Pieces:
    """What this rank holds of one global tensor: boxes, each a view of live memory. Not a Tensor on purpose:
    DCP would take a Tensor for the whole."""

    global_shape: Shape
    dtype: torch.dtype
    views: list[tuple[Box, Tensor]] = field(default_factory=list)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box, _ in self.views]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(self.global_shape)),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for box, view in self.views if torch.Size(box.offsets) == index.offset)

    def size(self) -> torch.Size:
        return torch.Size(self.global_shape)


def pieces_of(fragments: Iterable[Fragment]) -> dict[str, Pieces]:
    """{"<state>/<name>": what this rank holds of it}."""
    result: dict[str, Pieces] = {}
    for fragment in fragments:
        boxes = fragment.place.boxes(fragment.start, fragment.stop)
        for state, flat in fragment.tensors.items():
            key = f"{state}/{fragment.place.name}"
            pieces = result.setdefault(key, Pieces(fragment.place.global_shape, flat.dtype))
            begin = 0
            for box in boxes:
                view = flat.narrow(0, begin, box.numel).view(box.sizes)
                pieces.views.append((box, view))
                begin += box.numel
    return result


class SavePlanner(DefaultSavePlanner):
    """Writes what `Fragment.writer` says, each byte once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def _dedup_save_plans(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans  # one writer per box is our rule; a duplicate must fail DCP's validation, not vanish

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    """Reads every element that this rank holds, or fails."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default copies the state dict and expects tensors in it.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        plan: LoadPlan = super().create_local_plan()
        _assert_covered(self.state_dict, plan.items)
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        shard: Tensor = self.state_dict[index.fqn].__get_tensor_shard__(index)
        return shard


def stored_states(metadata: Metadata) -> dict[str, torch.dtype]:
    """{optimizer state: dtype} of a checkpoint, the weights left out."""
    states = {
        key.split("/", 1)[0]: stored.properties.dtype
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    states.pop("weight", None)
    return states


def refuse_other_model(metadata: Metadata, places: Iterable[Place], path: str) -> None:
    """A checkpoint of another model is refused with the differences, before anything is overwritten.

    places: of all parameters, also of those that this rank holds no fragment of: who refuses alone leaves the
    other ranks waiting.
    """
    stored: Mapping[str, Any] = metadata.state_dict_metadata
    differences = []
    for place in places:
        entry = stored.get(f"weight/{place.name}")
        if entry is None:
            differences.append(f"{place.name} is not in the checkpoint")
        elif tuple(entry.size) != place.global_shape:
            differences.append(f"{place.name} is {tuple(entry.size)} there and {place.global_shape} here")
    if differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if differences[5:] else "")
        raise user_error(
            "checkpoint.resume",
            path,
            f"the checkpoint must be of the same model and vocabulary, but {shown}",
            "take the model and tokenizer that the checkpoint was made with, or another run.dir",
        )


def _assert_covered(wanted: Mapping[str, Pieces], reads: Iterable[ReadItem]) -> None:
    missing = {key: sum(math.prod(box.sizes) for box, _ in pieces.views) for key, pieces in wanted.items()}
    for read in reads:
        assert read.type == LoadItemType.TENSOR, f"{read.dest_index.fqn} is no tensor in the checkpoint"
        missing[read.dest_index.fqn] -= math.prod(read.lengths)
    holes = [key for key, numel in missing.items() if numel]
    assert not holes, f"the checkpoint does not cover {holes[:3]} and {max(0, len(holes) - 3)} more"

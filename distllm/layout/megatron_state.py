"""Our process groups as Megatron Core's: as the arguments that it takes, and in the module where it looks."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup, get_process_group_ranks


def hand_over(
    *,
    data: ProcessGroup,
    tensor: ProcessGroup,
    pipeline: ProcessGroup,
    model: ProcessGroup,
    context: ProcessGroup,
    num_chunks: int,
) -> ProcessGroupCollection:
    """Return the groups in Megatron Core's form, and make them those of this process.

    Megatron Core 0.16.1 takes groups as arguments but looks some up in `parallel_state` all the same
    (schedules.py, tensor_parallel/random.py). Its own `initialize_model_parallel` makes all groups of all
    ranks on every rank, and those of a dozen uses that we have not: at 16,384 ranks 200,000 calls.

    The group of a tied embedding is kept from it: we add up its gradients and place its weights
    (engine/tied.py), where Megatron would send weights that are not there yet while it builds the model.
    """
    state: Any = parallel_state
    state._DATA_PARALLEL_GROUP = state._DATA_PARALLEL_GROUP_WITH_CP = data
    state._TENSOR_MODEL_PARALLEL_GROUP = tensor
    state._TENSOR_MODEL_PARALLEL_GLOBAL_RANKS = get_process_group_ranks(tensor)
    state._PIPELINE_MODEL_PARALLEL_GROUP = pipeline
    state._PIPELINE_GLOBAL_RANKS = get_process_group_ranks(pipeline)
    state._MODEL_PARALLEL_GROUP = model
    state._CONTEXT_PARALLEL_GROUP = context
    if num_chunks > 1:
        state._VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK = 0
        state._VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE = num_chunks
    state._set_global_memory_buffer()  # into which sequence parallelism gathers
    return ProcessGroupCollection(
        tp=tensor, pp=pipeline, mp=model, dp=data, dp_cp=data, cp=context, embd=None, pos_embd=None
    )


def forget() -> None:
    """Undo `hand_over`, so that a process may make other groups."""
    parallel_state.destroy_model_parallel()

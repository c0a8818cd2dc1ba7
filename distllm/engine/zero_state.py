"""Where DeepSpeed 0.19.8 keeps fp32 weights and optimizer states under ZeRO, parameter by parameter.

DeepSpeed flattens the parameters of a group into one buffer and gives each data-parallel rank a range of it.
The rank's range is one fp32 tensor, here called the *owner*: it is what the inner optimizer updates, and the
optimizer's states for it have its shape. So what a rank holds of a parameter is a range of an owner. Two
classes of DeepSpeed record these ranges in two ways; each has its function below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.layout.fragment import Fragment
from distllm.layout.place import Place


class OwnedRange(NamedTuple):
    """Flat elements [start, stop) of a parameter lie at owner[owner_start : owner_start + stop - start]."""

    start: int
    stop: int
    owner: Tensor
    owner_start: int


def zero_fragments(
    zero_optimizer: Any, places: Mapping[nn.Parameter, Place], create_states: Mapping[str, torch.dtype]
) -> list[Fragment]:
    """Return live views of this rank's part of every parameter; parameters it has no part of are left out.

    create_states: optimizer states to create first where they are missing, with their dtypes.
    """
    states = zero_optimizer.optimizer.state
    fragments = []
    for parameter, place in places.items():
        owned = owned_range(zero_optimizer, parameter)
        if owned is None:
            continue
        state = states[owned.owner]
        for name, dtype in create_states.items():
            if name not in state:
                state[name] = torch.zeros_like(owned.owner, dtype=dtype).detach()
        whole = {"weight": owned.owner} | {
            name: value
            for name, value in state.items()
            if value.shape == owned.owner.shape and name != "step"
        }
        views = {
            name: tensor.detach().narrow(0, owned.owner_start, owned.stop - owned.start)
            for name, tensor in whole.items()
        }
        fragments.append(Fragment(place, owned.start, owned.stop, views, writer=place.primary))
    return fragments


def state_owners(zero_optimizer: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield every owner of this rank with its optimizer state.

    It does not use the inner optimizer's param_groups: stage 3 empties them between steps.
    """
    if _is_stage_3(zero_optimizer):
        owners = zero_optimizer.fp32_partitioned_groups_flat
    else:
        owners = zero_optimizer.single_partition_of_fp32_groups
    for owner in owners:
        yield owner, zero_optimizer.optimizer.state[owner]


def refresh_working_weights(zero_optimizer: Any) -> None:
    """Copy the owners to the weights that compute, after the owners were written from outside DeepSpeed."""
    if _is_stage_3(zero_optimizer):
        zero_optimizer._partition_all_parameters()
        persistent = zero_optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
        for group in range(len(zero_optimizer.fp16_groups)):
            zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
        zero_optimizer.checkpoint_event_epilogue()
        return
    zero_optimizer.update_lp_params()


def owned_range(zero_optimizer: Any, parameter: nn.Parameter) -> OwnedRange | None:
    """Return which part of `parameter` this rank holds, and where; None if it holds nothing of it."""
    if _is_stage_3(zero_optimizer):
        return _range_stage_3(zero_optimizer, parameter)
    return _range_stage_1_and_2(zero_optimizer, parameter)


def _is_stage_3(zero_optimizer: Any) -> bool:
    return hasattr(zero_optimizer, "fp32_partitioned_groups_flat")


def _range_stage_3(zero_optimizer: Any, parameter: Any) -> OwnedRange | None:
    """Return the range under DeepSpeedZeroOptimizer_Stage3.

    It cuts each parameter into equal parts, one per rank, the last one padded.
    """
    group, owner_start, part_numel = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    start = zero_optimizer._get_param_partition_rank(parameter) * part_numel
    stop = min(start + part_numel, parameter.ds_numel)
    if start >= stop:
        return None
    return OwnedRange(start, stop, zero_optimizer.fp32_partitioned_groups_flat[group], owner_start)


def _range_stage_1_and_2(zero_optimizer: Any, parameter: nn.Parameter) -> OwnedRange | None:
    """Return the range under DeepSpeedZeroOptimizer, which cuts the flat group into equal ranges.

    A range may cross parameters. It is computed from the offsets, since DeepSpeed's own `_hp_mapping` is
    wrong under round_robin_gradients.
    """
    group, offset = _offsets_stage_1_and_2(zero_optimizer)[parameter]
    owner = zero_optimizer.single_partition_of_fp32_groups[group]
    owner_begin = dist.get_rank(zero_optimizer.real_dp_process_group[group]) * owner.numel()
    start = max(offset, owner_begin)
    stop = min(offset + parameter.numel(), owner_begin + owner.numel())
    if start >= stop:
        return None
    return OwnedRange(start - offset, stop - offset, owner, start - owner_begin)


def _offsets_stage_1_and_2(zero_optimizer: Any) -> dict[nn.Parameter, tuple[int, int]]:
    """Return the group of each parameter and where it begins in the group's flat buffer."""
    return {
        parameter: (group, offset)
        for group, (parameters, offsets) in enumerate(
            zip(
                zero_optimizer.round_robin_bit16_groups, zero_optimizer.round_robin_bit16_offsets, strict=True
            )
        )
        for parameter, offset in zip(parameters, offsets, strict=True)
    }

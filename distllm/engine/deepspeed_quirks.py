"""What has to be changed inside DeepSpeed 0.19.8, one function per quirk."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import numa, safe_set_full_grad
from torch import Tensor, nn

from distllm.engine.engine import StepGate
from distllm.engine.zero_state import owned_range
from distllm.layout.place import Place


def quieten() -> None:
    """Switch off a compilation at start-up for which DeepSpeed has no setting."""
    # By its full name: the attribute `torch` of deepspeed.comm is PyTorch.
    deepspeed_comm = importlib.import_module("deepspeed.comm.torch")
    # On CPUs it compiles a shared-memory all-reduce at start-up, for inference only, and prints that it did.
    deepspeed_comm.build_shm_op = lambda: None  # type: ignore[attr-defined]


def count_cores_once() -> None:
    """Keep the answer of `numactl`: the CPU accelerator starts it anew for each number of devices asked for,
    and ZeRO 3 asks with every bucket of gradients (a fork of the rank each time, a tenth of a small step)."""
    if not hasattr(numa.get_numa_cores, "cache_info"):
        numa.get_numa_cores = functools.cache(numa.get_numa_cores)


def count_replicas_once(
    zero_optimizer: Any, places: Mapping[nn.Parameter, Place], tensor_rank: int, zero_stage: int
) -> None:
    """Make the global gradient norm count every element of the model once.

    Parameters replicated over tensor-parallel ranks: DeepSpeed counts them on one rank only. At ZeRO stages 1
    and 2 that is rank 0 of the tensor group; at stage 3 it is rank 0 of the whole model group, so those of
    later pipeline stages are missing and the norm is 0.3% off.

    The last pipeline stage's copy of a tied embedding: it is marked as a replica, but ZeRO stage 3 ignores
    the mark.
    """
    for parameter, place in places.items():
        if not place.primary:
            parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
    if zero_stage < 3:
        return
    zero_optimizer.model_parallel_rank = tensor_rank
    norm_of = zero_optimizer.get_grad_norm_direct

    def norm_without_copies(gradients: Sequence[Tensor], params: Sequence[Any], norm_type: int = 2) -> Tensor:
        counted = [
            torch.zeros_like(g) if getattr(p, "ds_pipe_replicated", False) else g
            for g, p in zip(gradients, params, strict=True)
        ]
        result: Tensor = norm_of(counted, params, norm_type)
        return result

    zero_optimizer.get_grad_norm_direct = norm_without_copies


def reset_trace_once_per_step(zero_optimizer: Any) -> Callable[[], None]:
    """Return a function that resets ZeRO stage 3's trace; DeepSpeed itself no longer resets it.

    The trace records which modules run in which order, so that parameters are fetched ahead. DeepSpeed resets
    it in every forward pass, and until it is complete compares it over all ranks of the world: there a
    pipeline stage waits for the next stage, which waits for its activations. Call the returned function once
    per step, when no forward pass is in flight. The comparison is left out: data-parallel ranks run the same
    modules in the same order by construction.
    """
    coordinator_module = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator_module.assert_ints_same_as_other_ranks = lambda ints: None  # type: ignore[attr-defined]
    coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
    reset: Callable[[], None] = coordinator.reset_step
    coordinator.reset_step = lambda: None
    return reset


def unhook_modules_without_parameters(zero_optimizer: Any, root: nn.Module) -> None:
    """Leave stage 3's hooks on modules that have parameters, on `root` and on its chunks.

    DeepSpeed hooks every module, which costs a tenth of a millisecond a call, and prefetches at each of them:
    how much is gathered would depend on how many containers and identities a layer has. A chunk keeps its
    hooks since it owns the copy of a tied embedding, which is no parameter of a module that runs.
    """
    unhooked: set[int] = set()
    for name, module in root.named_modules():
        is_chunk = name.count(".") <= 1  # or root, or their list, which never runs
        if not is_chunk and next(module.parameters(recurse=False), None) is None:
            unhooked |= {id(module._forward_pre_hooks), id(module._forward_hooks)}
    offload = zero_optimizer.parameter_offload
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        if id(handle.hooks_dict_ref()) in unhooked:
            handle.remove()


def forward_in_flight_counters(module: nn.Module) -> list[tuple[Any, int]]:
    """Return each submodule's count of gradients to come, to restore it before the backward pass.

    ZeRO stage 3 keeps one count per submodule. With several forward passes in flight, each overwrites the
    count of the one before.
    """
    modules: list[Any] = [m for m in module.modules() if hasattr(m, "ds_grads_remaining")]
    return [(m, m.ds_grads_remaining) for m in modules]


def set_tied_gradient(zero_optimizer: Any, parameter: Any, gradient: Tensor, is_primary: bool) -> None:
    """Write the whole gradient of a parameter to where ZeRO keeps it, and its norm if ZeRO keeps that too."""
    flat = gradient.flatten()
    if hasattr(parameter, "ds_id"):
        # Stage 3 narrows the value to the rank's part. Parts are padded, so the value must be padded, too.
        _, _, part_numel = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % part_numel))
    safe_set_full_grad(parameter, flat if hasattr(parameter, "ds_id") else gradient)
    norms = getattr(zero_optimizer, "norm_for_param_grads", None)
    if norms:  # offloaded: DeepSpeed took the norm of the rank's part as the gradient came; copies count as 0
        owned = owned_range(zero_optimizer, parameter)
        part = flat[owned.start : owned.stop] if owned and is_primary else flat[:0]
        norms[zero_optimizer.get_param_id(parameter)] = part.float().norm()


def mask_norms_on_the_device() -> None:
    """Replace a norm that is not finite by -1 on the device, without waiting for it.

    DeepSpeed copies the -1 from the host for each norm that it takes, and so waits for the device.
    """

    def mask(norm: Tensor, device: object = None, val: float = -1.0) -> None:
        norm.masked_fill_(~torch.isfinite(norm), val)

    for module in ("utils", "zero.stage_1_and_2", "zero.stage3"):
        importlib.import_module(f"deepspeed.runtime.{module}").mask_nan_or_inf_with_val_inplace = mask  # type: ignore[attr-defined]


class NormJudge:
    """Asks the step gate between the gradient norm and the update, and prevents an update that it refuses.

    DeepSpeed's two classes skip an update, and drop its gradients, when the norm is not finite. So they are
    given infinity as the norm of a step that is refused. They read the norm several times, also after the
    update has begun; the norm that they are given lies in host memory, so that only the gate waits for the
    device.
    """

    gate: StepGate

    def __init__(self, zero_optimizer: Any, zero_stage: int) -> None:
        self._zero_optimizer = zero_optimizer
        self._is_overflown: Tensor | None = None  # [1], equal on all ranks
        if zero_stage == 3:
            norm_groups = zero_optimizer._get_norm_groups
            zero_optimizer._get_norm_groups = lambda: [self._judged(combine_grad_norm_groups(norm_groups()))]
        else:
            global_norm = zero_optimizer.scaled_global_norm
            zero_optimizer.scaled_global_norm = lambda: self._judged(global_norm())
            zero_optimizer.check_overflow = self._note_overflow

    def _note_overflow(self, partition_gradients: bool = True) -> None:
        """Note on the device whether any gradient of any rank is not finite.

        Replaces `check_overflow`, which reads the answer from the device. It finds what the norm does not,
        such as NaN in a replica of a parameter that is counted on another rank.
        """
        zero = self._zero_optimizer
        if zero.cpu_offload:
            found = torch.full((1,), float(zero.local_overflow), device=zero.device)
        else:
            found = zero.has_overflow_partitioned_grads_serial().float()
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=zero.dp_process_group)
        zero._model_parallel_all_reduce(tensor=found, op=dist.ReduceOp.MAX)
        self._is_overflown = found.bool()

    def _judged(self, norm: Tensor) -> Tensor:
        """Return the norm, or infinity if the step is refused, in host memory.

        DeepSpeed gives -1 for a norm that is not finite.
        """
        is_wrong = ~torch.isfinite(norm) | (norm < 0)
        if self._is_overflown is not None:
            is_wrong = is_wrong | self._is_overflown.reshape(()).to(norm.device)
        is_allowed = self.gate.allows(norm.masked_fill(is_wrong, math.nan))
        return torch.tensor(self.gate.result.grad_norm if is_allowed else math.inf, dtype=norm.dtype)

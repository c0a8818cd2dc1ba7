"""What has to be changed inside DeepSpeed 0.19.8, one function per quirk."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.utils import safe_set_full_grad
from torch import Tensor, nn

from distllm.engine.zero_state import owned_range
from distllm.layout.place import Place


def quieten() -> None:
    """Switch off two things that no setting reaches."""
    from deepspeed.runtime import bf16_optimizer

    # By its full name: the attribute `torch` of deepspeed.comm is PyTorch.
    deepspeed_comm = importlib.import_module("deepspeed.comm.torch")
    # On CPUs it compiles a shared-memory all-reduce at start-up, for inference only, and prints that it did.
    deepspeed_comm.build_shm_op = lambda: None  # type: ignore[attr-defined]
    # BF16_Optimizer prints the memory usage at every stage of its construction (force=True).
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


def count_replicas_once(
    zero_optimizer: Any, places: Mapping[nn.Parameter, Place], tensor_rank: int, stage: int
) -> None:
    """Make the global gradient norm count every element of the model once.

    Replicas over tensor-parallel ranks: DeepSpeed counts them on rank 0 only, of the tensor group at stages 1
    and 2 but of the whole model group at stage 3, which so drops those of later pipeline stages (the norm is
    0.3% off). The last stage's copy of a tied embedding: marked as a replica, which stage 3 ignores.
    """
    for parameter, place in places.items():
        if not place.primary:
            parameter.ds_pipe_replicated = True  # type: ignore[attr-defined]
    if stage < 3:
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
    """Stage 3 records which modules run in which order, to fetch parameters ahead. Returns the reset.

    DeepSpeed resets the record in every forward pass, and until it is complete compares it over all ranks of
    the world: a pipeline stage waits there for the next stage, which waits for its activations. Reset it once
    per step, when no forward pass is in flight, and leave out the comparison: data-parallel ranks run the
    same modules in the same order by construction.
    """
    coordinator_module = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator_module.assert_ints_same_as_other_ranks = lambda ints: None  # type: ignore[attr-defined]
    coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
    reset: Callable[[], None] = coordinator.reset_step
    coordinator.reset_step = lambda: None
    return reset


def forward_in_flight_counters(module: nn.Module) -> list[tuple[Any, int]]:
    """Stage 3 counts on each submodule how many gradients are to come. With several forward passes in flight
    the count is overwritten by each: keep what a forward pass has set, to restore it before its backward."""
    modules: list[Any] = [m for m in module.modules() if hasattr(m, "ds_grads_remaining")]
    return [(m, m.ds_grads_remaining) for m in modules]


def set_tied_gradient(zero_optimizer: Any, parameter: Any, gradient: Tensor, is_primary: bool) -> None:
    """Write the whole gradient of a parameter to wherever ZeRO keeps it, and its norm where that is kept."""
    if getattr(parameter, "_hp_grad", None) is not None:
        # BF16_Optimizer (stage 1 with bf16 weights): its setter writes a buffer that nobody reads.
        parameter._hp_grad.copy_(gradient.view_as(parameter._hp_grad))
        return
    flat = gradient.flatten()
    if hasattr(parameter, "ds_id"):
        # Stage 3 narrows the value to the rank's part, which is padded: so must the value be.
        _, _, part_numel = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % part_numel))
    safe_set_full_grad(parameter, flat if hasattr(parameter, "ds_id") else gradient)
    norms = getattr(zero_optimizer, "norm_for_param_grads", None)
    if norms:  # offloaded: the norm of the rank's part was taken when the gradient came; copies count as 0
        owned = owned_range(zero_optimizer, parameter)
        part = flat[owned.start : owned.stop] if owned and is_primary else flat[:0]
        norms[zero_optimizer.get_param_id(parameter)] = part.float().norm()


class NormJudge:
    """Asks `allows(norm)` between the gradient norm and the update; what is refused does not happen.

    DeepSpeed's three classes skip an update, and drop its gradients, when the norm is not finite: where the
    judge refuses, they see infinity. norm: the true one of the last step, NaN where it is not finite.
    """

    def __init__(self, zero_optimizer: Any, stage: int) -> None:
        self.allows: Callable[[float], bool] = lambda norm: True
        self.norm = math.nan
        if stage == 3:
            norm_groups = zero_optimizer._get_norm_groups
            zero_optimizer._get_norm_groups = lambda: self._judged(
                groups := norm_groups(), combine_grad_norm_groups(groups)
            )
        elif hasattr(zero_optimizer, "scaled_global_norm"):
            global_norm = zero_optimizer.scaled_global_norm
            zero_optimizer.scaled_global_norm = lambda: self._judged([norm := global_norm()], norm)[0]
        else:
            self._wrap_bf16_optimizer(zero_optimizer)
        step = zero_optimizer.step

        def forget_and_step(*arguments: Any, **keywords: Any) -> None:
            self.norm = math.nan  # which stays where DeepSpeed finds infinities before it takes the norm
            step(*arguments, **keywords)

        zero_optimizer.step = forget_and_step

    def _wrap_bf16_optimizer(self, zero_optimizer: Any) -> None:
        gradients_for_norm = zero_optimizer.get_grads_for_norm

        def judged(for_clipping: bool = False) -> Any:
            result = gradients_for_norm(for_clipping)
            if for_clipping:
                return result
            gradients, expert_gradients = result
            norm = get_global_norm_of_tensors(
                gradients, mpu=zero_optimizer.mpu, norm_type=zero_optimizer.norm_type
            )
            return self._judged(gradients, norm), expert_gradients

        zero_optimizer.get_grads_for_norm = judged

    def _judged(self, values: list[Tensor], norm: Tensor | float) -> list[Tensor]:
        """`values`, or infinity in their place. DeepSpeed says -1 for a norm that is not finite."""
        value = float(norm)
        self.norm = value if value >= 0 and math.isfinite(value) else math.nan
        if self.allows(self.norm):
            return values
        device = norm.device if isinstance(norm, Tensor) else None
        return [torch.tensor(math.inf, device=device)]

"""ZeRO stages 2 and 3, and 1 with offload, under Megatron's schedules: the adapter around DeepSpeed 0.19.8.

One DeepSpeed engine wraps all chunks of a rank. Every departure from DeepSpeed's normal use is a method here
whose docstring names the problem that it avoids; tests switch them off one by one and see a job go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from distllm.config.schema import Config
from distllm.engine.deepspeed_quirks import (
    NormJudge,
    count_cores_once,
    count_replicas_once,
    forward_in_flight_counters,
    mask_norms_on_the_device,
    quieten,
    reset_trace_once_per_step,
    set_tied_gradient,
    unhook_modules_without_parameters,
)
from distllm.engine.engine import Engine, StepGate
from distllm.engine.objective import Objective
from distllm.engine.optimizer import create_optimizer
from distllm.engine.tied import tied_copy
from distllm.engine.zero_state import refresh_working_weights, state_owners, zero_fragments
from distllm.layout.dtypes import DTYPES
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place
from distllm.layout.whole import WholeLimits, whole_limits


class ZeroEngine(Engine):
    """A DeepSpeed engine driven by Megatron's schedules."""

    is_split = True

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        places: dict[nn.Parameter, Place],
        config: Config,
        groups: Groups,
        objective: Objective,
    ) -> None:
        quieten()
        count_cores_once()
        mask_norms_on_the_device()
        self.zero_stage: int = config.zero.stage
        self.is_offloaded = config.zero.offload_optimizer
        self.tied = tied_copy(places, groups, config.model.tie_embeddings)
        optimizer = create_optimizer([(place, p) for p, place in places.items()], config.optimizer)
        stages = [_Stage(self, index, chunk) for index, chunk in enumerate(chunks)]
        super().__init__(stages, places, groups, objective)
        self.deepspeed, self.zero_optimizer, _, _ = deepspeed.initialize(
            model=_Chunks(chunks),
            optimizer=optimizer,
            mpu=_MegatronGroups(groups),
            config=deepspeed_config(
                config,
                _largest_stage_numel(places, groups),
                whole_limits({place.name: place.numel for place in places.values()}, config.zero.bucket_size),
            ),
        )
        count_replicas_once(self.zero_optimizer, places, groups.coordinates.tensor, self.zero_stage)
        self.norm_judge = NormJudge(self.zero_optimizer, self.zero_stage)
        self.reset_trace = None
        if self.zero_stage == 3:
            self.reset_trace = reset_trace_once_per_step(self.zero_optimizer)
            unhook_modules_without_parameters(self.zero_optimizer, self.deepspeed.module)
        self.num_microbatches = 0
        self.num_backwards = [0] * len(chunks)

    def _begin_step(self, num_microbatches: int) -> None:
        self.num_microbatches = num_microbatches
        self.num_backwards = [0] * len(self.chunks)
        if self.is_offloaded and self.zero_stage == 2:
            # If this is above 1, DeepSpeed updates with the sum that it keeps in host memory, else with the
            # gradient of the last microbatch.
            self.zero_optimizer.gradient_accumulation_steps = num_microbatches
        self._reset_trace()

    def _set_training(self, mode: bool) -> None:
        self._reset_trace()
        self.deepspeed.train(mode)

    def _reset_trace(self) -> None:
        if self.reset_trace:
            self.reset_trace()

    def forward_chunk(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.deepspeed(index, *args, **kwargs)
        if not torch.is_grad_enabled():
            return output
        counters = forward_in_flight_counters(self.deepspeed.module) if self.zero_stage == 3 else []
        return _BeforeBackward.apply(output, partial(self._before_backward, index, counters))

    def _before_backward(self, index: int, counters: list[tuple[Any, int]]) -> None:
        """Prepare DeepSpeed for a backward pass; called before its own backward hooks.

        DeepSpeed expects one forward pass before each backward pass. It clears its "backward seen" flag only
        in `forward`, but the cool-down of a pipeline runs several backward passes in a row (`KeyError: 0` at
        ZeRO stage 1, a `NoneType` at stage 2). At stage 3 the forward passes in flight share each submodule's
        counter of gradients to come; unless it is restored, parameters gathered by a backward pass of the
        cool-down stay in memory until the end of the pass.
        """
        self.zero_optimizer.clear_backward_seen_flag()
        for module, count in counters:
            module.ds_grads_remaining = count
        self._set_micro_step(self.num_backwards[index])
        self.num_backwards[index] += 1
        self.deepspeed.set_gradient_accumulation_boundary(self._is_boundary(index))

    def _set_micro_step(self, backwards_done: int) -> None:
        """Set DeepSpeed's count of backward passes in this step to that of the chunk whose pass comes next.

        DeepSpeed copies gradients in the first backward pass of a step and adds them in later ones. Stage 3,
        and stage 2 with offload to host memory, decide by this count, so each chunk needs its own.
        """
        if self.zero_stage == 3:
            self.zero_optimizer.micro_step_id = min(backwards_done, 1)
        elif self.is_offloaded and self.zero_stage == 2:
            self.zero_optimizer.micro_step_id = backwards_done - 1  # DeepSpeed adds 1 before it looks

    def _is_boundary(self, index: int) -> bool:
        """Return whether the current backward pass of this chunk ends DeepSpeed's gradient accumulation.

        That is the last backward pass of the step, in which stage 1 reduces gradients. With offload at stages
        2 and 3 gradients go to host memory as they come, and it is the last backward pass of each chunk: only
        then does DeepSpeed hand the gradients to the optimizer states.
        """
        if self.is_offloaded and self.zero_stage >= 2:
            return self.num_backwards[index] == self.num_microbatches
        return all(number == self.num_microbatches for number in self.num_backwards)

    def release(self) -> None:
        """Break DeepSpeed's reference cycle: its hooks hold its engine, which holds the hooked parameters."""
        self.deepspeed.destroy()

    def _optimizer_step(self, learning_rate: float, gate: StepGate) -> None:
        assert set(self.num_backwards) == {self.num_microbatches}, "some backward passes did not happen"
        self._add_up_tied_gradients()
        for group in self.zero_optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.norm_judge.gate = gate
        self.deepspeed.step()
        assert gate.result.is_applied == (not self.zero_optimizer.overflow), "DeepSpeed judged otherwise"

    def _add_up_tied_gradients(self) -> None:
        """Give both copies of a tied embedding the sum of their gradients, wherever ZeRO keeps these."""
        if self.tied is None:
            return
        gradient = safe_get_full_grad(self.tied)
        dist.all_reduce(gradient, group=self.groups.embedding)
        set_tied_gradient(self.zero_optimizer, self.tied, gradient, self.places[self.tied].primary)

    def fragments(self, create_states: Mapping[str, torch.dtype] | None = None) -> list[Fragment]:
        return zero_fragments(self.zero_optimizer, self.places, create_states or {})

    def states(self) -> dict[str, torch.dtype]:
        return {
            name: value.dtype
            for owner, state in state_owners(self.zero_optimizer)
            for name, value in state.items()
            if value.shape == owner.shape and name != "step"
        }

    def scalars(self) -> dict[str, float]:
        steps = {float(state["step"]) for _, state in state_owners(self.zero_optimizer) if "step" in state}
        assert len(steps) <= 1, f"the optimizer counts different steps for different partitions: {steps}"
        return {"step": steps.pop()} if steps else {}

    def after_load(self, scalars: Mapping[str, float]) -> None:
        if "step" in scalars:
            for owner, state in state_owners(self.zero_optimizer):
                state["step"] = torch.tensor(scalars["step"], dtype=torch.float32, device=owner.device)
        refresh_working_weights(self.zero_optimizer)


def partitioner(config: Config, groups: Groups) -> Callable[[nn.Parameter], None]:
    """Return a function that replaces a parameter's values by this rank's part of them (stage 3).

    By what `deepspeed.zero.Init` does to each parameter, without its patches of PyTorch's modules;
    `deepspeed.initialize` leaves parameters that are partitioned alone. It would partition only once a rank
    holds all of them, and broadcast each before.
    """
    quieten()
    init = deepspeed.zero.Init(
        data_parallel_group=groups.loss.group,
        config_dict_or_path=deepspeed_config(config),
        dtype=DTYPES[config.train.precision],
        mpu=_MegatronGroups(groups),
    )

    def partition(parameter: Any) -> None:
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return partition


def deepspeed_config(
    config: Config, largest_stage_numel: int = 1, limits: WholeLimits | None = None
) -> dict[str, Any]:
    """Return DeepSpeed's configuration, derived from ours; it is never written by hand.

    DeepSpeed's number of gradient accumulation steps stays 1, because Megatron already divides the loss by
    the number of microbatches: if both divide, gradients are wrong by far, without any error. ZeRO stage 3
    cuts the parameters into sub-groups and synchronizes all ranks in each: pipeline stages with different
    numbers of sub-groups would wait for each other for ever, so every pipeline stage is one sub-group.
    """
    zero = config.zero
    section: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": zero.bucket_size,
        "allgather_bucket_size": zero.bucket_size,
        "overlap_comm": zero.overlap_comm,
        "stage3_prefetch_bucket_size": zero.bucket_size,
        "stage3_param_persistence_threshold": zero.persistence_threshold,
        "sub_group_size": largest_stage_numel,
    }
    if limits:
        section["stage3_max_reuse_distance"] = limits.reuse
        section["stage3_max_live_parameters"] = limits.live
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "steps_per_print": None,
        "zero_optimization": section,
        "zero_force_ds_cpu_optimizer": False,  # our optimizer runs where the states are
        "zero_allow_untested_optimizer": True,  # ZeRO works with any that updates element by element
        # It synchronizes with the device at each forward pass, for a throughput that nobody reads.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    if config.train.precision == "bf16":
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": config.train.gradient_accumulation}
        # The default is bf16, in whatever dtype gradients were accumulated.
        result["communication_data_type"] = config.train.gradient_accumulation
    return result


def _largest_stage_numel(places: Mapping[nn.Parameter, Place], groups: Groups) -> int:
    numel = torch.tensor([sum(place.numel for place in places.values())], device=next(iter(places)).device)
    dist.all_reduce(numel, op=dist.ReduceOp.MAX, group=groups.model)
    return int(numel.item())


class _Chunks(nn.Module):
    """All chunks of a rank as one module, for one DeepSpeed engine."""

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.chunks[index](*args, **kwargs)
        return output


class _Stage(nn.Module):
    """A chunk as Megatron's schedule sees it: the attributes of the module, the engine's forward pass."""

    def __init__(self, engine: ZeroEngine, index: int, chunk: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that the chunk is not a submodule: its parameters belong to DeepSpeed's engine.
        self.behind: tuple[ZeroEngine, int, Any] = (engine, index, chunk)
        self.config = self.behind[2].config
        self.model_type = self.behind[2].model_type
        self.vp_stage = self.behind[2].vp_stage
        self.share_embeddings_and_output_weights = self.behind[2].share_embeddings_and_output_weights

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.behind[2].set_input_tensor(input_tensor)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        engine, index, _ = self.behind
        return engine.forward_chunk(index, *args, **kwargs)


class _BeforeBackward(torch.autograd.Function):
    """The identity; its backward pass calls `hook` first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hook: Callable[[], None]) -> Tensor:
        ctx.hook = hook
        return x.detach()  # a view would be refused by Megatron's deallocate_output_tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.hook()
        return gradient, None


class _MegatronGroups:
    """The process groups under the names by which DeepSpeed asks for them: its `mpu`."""

    def __init__(self, groups: Groups) -> None:
        for name, group in (
            ("data", groups.loss.group),
            ("model", groups.norm),
            ("tensor_model", groups.tensor),
            ("pipeline_model", groups.pipeline),
        ):
            setattr(self, f"get_{name}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{name}_parallel_rank", partial(dist.get_rank, group))
            setattr(self, f"get_{name}_parallel_world_size", partial(dist.get_world_size, group))

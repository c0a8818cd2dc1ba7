"""ZeRO stages 1 to 3: the adapter around DeepSpeed 0.19.8, trap by trap.

- Loss scaling: DeepSpeed's gradient accumulation stays 1 and its boundary is set by hand, because Megatron
  already divides the loss by the number of microbatches. With both dividing, gradients are wrong by far and
  nothing complains.
- Hooks: DeepSpeed forgets its "backward seen" flag only in `forward`; `_BeforeBackward` makes it forget
  before every backward pass, since pipeline schedules run several in a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.optimizer import create_adamw
from distllm.engine.zero_state import refresh_working_weights, state_owners, zero_fragments
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place


class ZeroEngine(Engine):
    """A DeepSpeed engine driven by Megatron's schedules."""

    def __init__(
        self, module: nn.Module, places: dict[nn.Parameter, Place], config: Config, groups: Groups
    ) -> None:
        _quieten_deepspeed()
        optimizer = create_adamw(places, {p: p for p in places}, config.optimizer)
        self.deepspeed, self.zero_optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, mpu=_MegatronGroups(groups), config=deepspeed_config(config)
        )
        self.remaining_backwards = 0
        super().__init__(_Stage(self, module), places, groups)

    def _begin_step(self, num_microbatches: int) -> None:
        self.remaining_backwards = num_microbatches

    def before_backward(self) -> None:
        """Runs before each backward pass, ahead of DeepSpeed's own hooks."""
        self.remaining_backwards -= 1
        self.zero_optimizer.clear_backward_seen_flag()
        self.deepspeed.set_gradient_accumulation_boundary(self.remaining_backwards == 0)

    def _optimizer_step(self, learning_rate: float) -> float:
        assert self.remaining_backwards == 0, f"{self.remaining_backwards} backward passes did not happen"
        for group in self.zero_optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        return float(self.deepspeed.get_global_grad_norm())

    def fragments(self, create_states: Mapping[str, torch.dtype] | None = None) -> list[Fragment]:
        return zero_fragments(self.zero_optimizer, self.places, create_states or {})

    def scalars(self) -> dict[str, float]:
        steps = {float(state["step"]) for _, state in state_owners(self.zero_optimizer) if "step" in state}
        assert len(steps) <= 1, f"the optimizer counts different steps for different partitions: {steps}"
        return {"step": steps.pop() if steps else 0.0}

    def after_load(self, scalars: Mapping[str, float]) -> None:
        for owner, state in state_owners(self.zero_optimizer):
            state["step"] = torch.tensor(scalars["step"], dtype=torch.float32, device=owner.device)
        refresh_working_weights(self.zero_optimizer)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours; nobody writes it by hand."""
    zero = config.zero
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": zero.bucket_size,
            "allgather_bucket_size": zero.bucket_size,
            "overlap_comm": zero.overlap_comm,
            "stage3_prefetch_bucket_size": zero.bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
        },
    }
    if config.train.precision == "bf16":
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def _quieten_deepspeed() -> None:
    """Switch off two things of DeepSpeed 0.19.8 that no setting reaches."""
    from deepspeed.runtime import bf16_optimizer

    # By its full name: the attribute `torch` of deepspeed.comm is PyTorch.
    deepspeed_comm = importlib.import_module("deepspeed.comm.torch")
    # On CPUs it compiles a shared-memory all-reduce at start-up, for inference only, and prints that it did.
    deepspeed_comm.build_shm_op = lambda: None  # type: ignore[attr-defined]
    # BF16_Optimizer prints the memory usage at every stage of its construction (force=True).
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None


class _Stage(nn.Module):
    """What Megatron's schedule sees: the attributes of the module, the forward pass of the engine."""

    def __init__(self, engine: ZeroEngine, module: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that they are not submodules: their parameters belong to DeepSpeed's engine.
        self.behind: tuple[ZeroEngine, Any] = (engine, module)
        self.config = self.behind[1].config
        self.model_type = self.behind[1].model_type

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.behind[1].set_input_tensor(input_tensor)

    def train(self, mode: bool = True) -> _Stage:
        self.behind[0].deepspeed.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        engine, _ = self.behind
        output: Tensor = engine.deepspeed(*args, **kwargs)
        if torch.is_grad_enabled():
            output = _BeforeBackward.apply(output, engine.before_backward)
        return output


class _BeforeBackward(torch.autograd.Function):
    """Identity whose backward calls `hook` first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hook: Callable[[], None]) -> Tensor:
        ctx.hook = hook
        return x.detach()  # a view would be refused by Megatron's deallocate_output_tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.hook()
        return gradient, None


class _MegatronGroups:
    """The groups under the names by which DeepSpeed asks for them: its `mpu`."""

    def __init__(self, groups: Groups) -> None:
        for axis, group in (
            ("data", groups.data),
            ("model", groups.model),
            ("tensor_model", groups.tensor),
            ("pipeline_model", groups.pipeline),
        ):
            setattr(self, f"get_{axis}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{axis}_parallel_rank", partial(dist.get_rank, group))
            setattr(self, f"get_{axis}_parallel_world_size", partial(dist.get_world_size, group))

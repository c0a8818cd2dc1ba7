"""ZeRO stage 0: every data-parallel rank holds all weights, gradients and optimizer states of its part.

It does not use DeepSpeed's stage 0, which (0.19.8) accumulates bf16 gradients in bf16, takes a phantom
optimizer step at start-up under bf16, refuses backward passes that do not start at a loss (which pipeline
stages need), and clips with a norm that counts replicated parameters on one pipeline stage only.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.config.schema import Config
from distllm.engine.engine import Engine, StepGate
from distllm.engine.objective import Objective
from distllm.engine.optimizer import create_optimizer
from distllm.engine.reduction import GradientReduction
from distllm.engine.tied import tied_copy
from distllm.layout.dtypes import DTYPES
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place


class ReplicatedEngine(Engine):
    """An engine that keeps gradients in one flat buffer and reduces it once per step.

    bf16 weights have fp32 master copies.
    """

    is_split = False

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        places: dict[nn.Parameter, Place],
        config: Config,
        groups: Groups,
        objective: Objective,
    ) -> None:
        super().__init__(chunks, places, groups, objective)
        self.clip_grad = config.optimizer.clip_grad
        self.masters = _create_masters(places)
        self.optimizer = create_optimizer(places, self.masters, config.optimizer)
        self.tied = tied_copy(places, groups, config.model.tie_embeddings)
        dtype = DTYPES[config.train.gradient_accumulation]
        self.flat_gradient = torch.zeros(sum(p.numel() for p in places), dtype=dtype, device=self.device)
        ranges = _ranges(places)
        self.gradients = {
            p: self.flat_gradient[where.start : where.stop].view_as(p) for p, where in ranges.items()
        }
        reducing = groups.gradient(next(iter(places.values())))  # the same ranks for all parameters
        self.reduction = GradientReduction(
            self.flat_gradient, ranges, config.zero.bucket_size, reducing.group, config.zero.overlap_comm
        )
        self.without_gradient: set[nn.Parameter] = set()
        # autograd keeps hooks where Python's garbage collector does not look: a hook that held the engine,
        # which holds the parameters, would keep both, and the process groups, until the process ends.
        engine = weakref.proxy(self)
        for parameter in places:
            parameter.register_post_accumulate_grad_hook(lambda tensor: engine._accumulate(tensor))

    def _begin_step(self, num_microbatches: int) -> None:
        self.without_gradient = set(self.places)
        self.reduction.begin_step(num_microbatches)

    @torch.no_grad()
    def _accumulate(self, parameter: Tensor) -> None:
        """Move the gradient that a backward pass has computed into the flat gradient, in the latter's dtype.

        For bf16 parameters that may be fp32: a bf16 sum over many microbatches loses the small gradients.
        """
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None, "the hook runs after a gradient was accumulated"
        if parameter in self.without_gradient:
            self.without_gradient.remove(parameter)
            self.gradients[parameter].copy_(parameter.grad)  # less memory traffic than zeroing and adding
        else:
            self.gradients[parameter].add_(parameter.grad)
        parameter.grad = None
        self.reduction.gradient_added(parameter)

    @torch.no_grad()
    def _optimizer_step(self, learning_rate: float, gate: StepGate) -> None:
        for parameter in self.without_gradient:
            self.gradients[parameter].zero_()
        self.reduction.finish()
        if self.tied is not None:
            dist.all_reduce(self.gradients[self.tied], group=self.groups.embedding)
        grad_norm = self._global_grad_norm()
        if not gate.allows(grad_norm):
            return
        if self.clip_grad > 0:
            # 1e-6 as in torch.nn.utils.clip_grad_norm_ and DeepSpeed: all ZeRO stages must clip alike.
            self.flat_gradient.mul_(torch.clamp(self.clip_grad / (grad_norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter, master in self.masters.items():
            master.grad = self.gradients[parameter].to(master.dtype)  # itself where the types are equal
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # else autograd would add to gradients of fp32 parameters
        self._refresh_working_weights()

    def _global_grad_norm(self) -> Tensor:
        """Return the norm of all gradients, in which every element of the model counts once.

        Replicas are left out; the squares of the parts are summed over ranks.
        """
        counted = [self.gradients[p] for p, place in self.places.items() if place.primary]
        norms = torch.stack(torch._foreach_norm(counted, dtype=torch.float32)) if counted else torch.zeros(1)
        squares = norms.to(self.device).square().sum()
        dist.all_reduce(squares, group=self.groups.norm)
        return squares.sqrt()

    @torch.no_grad()
    def _refresh_working_weights(self) -> None:
        working: list[Tensor] = [p for p, master in self.masters.items() if p is not master]
        if working:
            torch._foreach_copy_(working, [m for p, m in self.masters.items() if p is not m])

    def fragments(self, create_states: Mapping[str, torch.dtype] | None = None) -> list[Fragment]:
        fragments = []
        # Data-parallel ranks share the writing: each parameter goes to the one with the least so far.
        written_numel = [0] * self.groups.samples.size
        for parameter, place in self.places.items():
            master = self.masters[parameter]
            state = self.optimizer.state[master]
            for name, dtype in (create_states or {}).items():
                if name not in state:
                    state[name] = torch.zeros_like(master, dtype=dtype)
            writer_rank = written_numel.index(min(written_numel))
            written_numel[writer_rank] += master.numel()
            tensors = {"weight": master.detach()} | {
                name: value for name, value in state.items() if value.shape == master.shape and name != "step"
            }
            fragments.append(
                Fragment(
                    place,
                    0,
                    master.numel(),
                    {name: tensor.view(-1) for name, tensor in tensors.items()},
                    writer=place.primary and writer_rank == self.groups.samples.rank,
                )
            )
        return fragments

    def states(self) -> dict[str, torch.dtype]:
        masters = self.optimizer.state.items()
        return {
            name: value.dtype
            for master, state in masters
            for name, value in state.items()
            if value.shape == master.shape and name != "step"
        }

    def scalars(self) -> dict[str, float]:
        steps = {float(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, f"the optimizer counts different steps for different parameters: {steps}"
        return {"step": steps.pop()} if steps else {}

    def after_load(self, scalars: Mapping[str, float]) -> None:
        if "step" in scalars:
            for master in self.masters.values():
                # fused AdamW needs its step on the parameter's device, as an fp32 tensor
                step = torch.tensor(scalars["step"], dtype=torch.float32, device=master.device)
                self.optimizer.state[master]["step"] = step
        self._refresh_working_weights()


def _create_masters(places: Mapping[nn.Parameter, Place]) -> dict[nn.Parameter, nn.Parameter]:
    """Return the fp32 weight of each parameter: itself, or a copy if the parameter has a lower precision."""
    return {p: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone()) for p in places}


def _ranges(places: Mapping[nn.Parameter, Place]) -> dict[nn.Parameter, range]:
    """Return the range of each parameter in the flat gradient, one parameter after the other."""
    ranges: dict[nn.Parameter, range] = {}
    offset = 0
    for parameter in places:
        ranges[parameter] = range(offset, offset + parameter.numel())
        offset += parameter.numel()
    return ranges

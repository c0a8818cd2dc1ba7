"""ZeRO stages 0 and 1 by flat buckets: all weights and gradients of its part of the model on every rank.

At stage 0 a rank holds all optimizer states too. At stage 1 each data-parallel rank holds those of its part
of every bucket: gradients are reduce-scattered, while the last backward passes go on, and updated weights are
all-gathered while the next forward pass begins (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).

It does not use DeepSpeed for these stages. Its stage 0 (0.19.8) accumulates bf16 gradients in bf16, takes a
phantom optimizer step at start-up under bf16, refuses backward passes that do not start at a loss (which
pipeline stages need), and clips with a norm that counts replicated parameters on one pipeline stage only. Its
stage 1 all-reduces gradients instead of scattering them, with bf16 weights after the last backward pass only,
and loses gradients of interleaved chunks where it overlaps.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.config.schema import Config
from distllm.engine.engine import Engine, StepGate
from distllm.engine.gathering import WeightGathering
from distllm.engine.objective import Objective
from distllm.engine.optimizer import create_optimizer
from distllm.engine.reduction import GradientReduction
from distllm.engine.tied import tied_copy
from distllm.layout.dtypes import DTYPES
from distllm.layout.flat import Bucket, pack
from distllm.layout.fragment import Fragment
from distllm.layout.groups import Groups
from distllm.layout.place import Place


@dataclass(frozen=True)
class Piece:
    """What this rank updates of a parameter: flat elements [start, stop).

    gradient: a view of them in a bucket. In the parameter's shape where the piece is all of it, so that an
        optimizer can update whole matrices; flat otherwise.
    working: likewise of the weights that compute.
    master: in fp32, what the optimizer updates; of `working`'s memory if that is fp32 too.
    """

    parameter: nn.Parameter
    place: Place
    start: int
    stop: int
    gradient: Tensor
    working: Tensor
    master: nn.Parameter


class FlatEngine(Engine):
    """An engine that keeps gradients in flat buckets and reduces them once per step.

    bf16 weights have fp32 master copies.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        places: dict[nn.Parameter, Place],
        config: Config,
        groups: Groups,
        objective: Objective,
    ) -> None:
        super().__init__(chunks, places, groups, objective)
        zero = config.zero
        self.is_split = zero.stage == 1
        self.clip_grad = config.optimizer.clip_grad
        self.tied = tied_copy(places, groups, config.model.tie_embeddings)
        self.role = groups.gradient(next(iter(places.values())))  # the same ranks for all parameters
        num_parts = self.role.size if self.is_split else 1
        sizes = {p: p.numel() for p in places}
        alone = set() if self.tied is None else {self.tied}  # both stages then cut its copies alike
        buckets = pack(sizes, zero.bucket_size, num_parts, alone)
        dtype = DTYPES[config.train.gradient_accumulation]
        self.flat_gradients = [torch.zeros(b.numel, dtype=dtype, device=self.device) for b in buckets]
        self.gradients = _views(buckets, self.flat_gradients)
        self.reduction = GradientReduction(
            buckets, self.flat_gradients, self.role, zero.bucket_size, zero.overlap_comm
        )
        self.gathering: WeightGathering | None = None
        if num_parts > 1:
            self.gathering = WeightGathering(buckets, self.role, chunks, zero.overlap_comm)
            self.pieces = self._cut_pieces(buckets)
        else:
            self.pieces = [_whole_piece(p, place, self.gradients[p]) for p, place in places.items()]
        self.optimizer = create_optimizer([(p.place, p.master) for p in self.pieces], config.optimizer)
        self.without_gradient: set[nn.Parameter] = set()
        # autograd keeps hooks where Python's garbage collector does not look: a hook that held the engine,
        # which holds the parameters, would keep both, and the process groups, until the process ends.
        engine = weakref.proxy(self)
        for parameter in places:
            parameter.register_post_accumulate_grad_hook(lambda tensor: engine._accumulate(tensor))

    def _cut_pieces(self, buckets: Sequence[Bucket[nn.Parameter]]) -> list[Piece]:
        """Return the pieces of this rank's parts; one without elements if there are none, so that this rank
        names the same optimizer states as the others."""
        found = [
            (parameter, elements)
            for bucket in buckets
            for parameter, elements in bucket.pieces(self.role.rank)
        ]
        pieces = []
        for parameter, elements in found or [(next(iter(self.places)), range(0))]:
            cut = slice(elements.start, elements.stop)
            working = parameter.detach().view(-1)[cut]
            gradient = self.gradients[parameter].view(-1)[cut]
            master = nn.Parameter(working if working.dtype == torch.float32 else working.float())
            place = self.places[parameter]
            pieces.append(Piece(parameter, place, cut.start, cut.stop, gradient, working, master))
        return pieces

    def _begin_step(self, num_microbatches: int) -> None:
        self.without_gradient = set(self.places)
        self.reduction.begin_step(num_microbatches)

    @torch.no_grad()
    def _accumulate(self, parameter: Tensor) -> None:
        """Move the gradient that a backward pass has computed into its bucket, in the bucket's dtype.

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
        if self.gathering is not None:
            self.gathering.finish()  # of parameters that no module has used
        for parameter in self.without_gradient:
            self.gradients[parameter].zero_()
        self.reduction.finish()
        self._add_up_tied_gradients()
        grad_norm = self._global_grad_norm()
        if not gate.allows(grad_norm):
            return
        if self.clip_grad > 0:
            # 1e-6 as in torch.nn.utils.clip_grad_norm_ and DeepSpeed: all ZeRO stages must clip alike.
            factor = torch.clamp(self.clip_grad / (grad_norm + 1e-6), max=1.0)
            for owned in self.reduction.owned:
                owned.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for piece in self.pieces:
            piece.master.grad = piece.gradient.to(piece.master.dtype)  # itself where the types are equal
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # else autograd would add to gradients of fp32 parameters
        self._refresh_working_weights()

    def _add_up_tied_gradients(self) -> None:
        if self.tied is None:
            return
        index = next(i for i, bucket in enumerate(self.reduction.buckets) if self.tied in bucket.ranges)
        dist.all_reduce(self.reduction.owned[index], group=self.groups.embedding)

    def _global_grad_norm(self) -> Tensor:
        """Return the norm of all gradients, in which every element of the model counts once.

        Replicas are left out; the squares of the parts are summed over ranks.
        """
        counted = [piece.gradient for piece in self.pieces if piece.place.primary]
        norms = torch.stack(torch._foreach_norm(counted, dtype=torch.float32)) if counted else torch.zeros(1)
        squares = norms.to(self.device).square().sum()
        if self.is_split:
            dist.all_reduce(squares, group=self.role.group)
        dist.all_reduce(squares, group=self.groups.norm)
        return squares.sqrt()

    @torch.no_grad()
    def _refresh_working_weights(self) -> None:
        copied = [piece for piece in self.pieces if piece.working.dtype != piece.master.dtype]
        if copied:
            torch._foreach_copy_([p.working for p in copied], [p.master for p in copied])
        if self.gathering is not None:
            self.gathering.start()

    def fragments(self, create_states: Mapping[str, torch.dtype] | None = None) -> list[Fragment]:
        fragments = []
        # At stage 0 data-parallel ranks share the writing: each parameter goes to the one with the least.
        written_numel = [0] * self.groups.samples.size
        for piece in self.pieces:
            state = self.optimizer.state[piece.master]
            for name, dtype in (create_states or {}).items():
                if name not in state:
                    state[name] = torch.zeros_like(piece.master, dtype=dtype)
            writer_rank = written_numel.index(min(written_numel))
            written_numel[writer_rank] += piece.master.numel()
            is_writer = self.is_split or writer_rank == self.groups.samples.rank
            tensors = {"weight": piece.master.detach()} | self._states_of(piece)
            fragments.append(
                Fragment(
                    piece.place,
                    piece.start,
                    piece.stop,
                    {name: tensor.view(-1) for name, tensor in tensors.items()},
                    writer=piece.place.primary and is_writer,
                )
            )
        return [fragment for fragment in fragments if fragment.start < fragment.stop]

    def _states_of(self, piece: Piece) -> dict[str, Tensor]:
        """Return the optimizer's states of each element; `step` is one number for all."""
        state = self.optimizer.state[piece.master]
        return {
            name: value
            for name, value in state.items()
            if name != "step" and value.shape == piece.master.shape
        }

    def states(self) -> dict[str, torch.dtype]:
        return {name: value.dtype for piece in self.pieces for name, value in self._states_of(piece).items()}

    def scalars(self) -> dict[str, float]:
        steps = {float(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, f"the optimizer counts different steps for different parameters: {steps}"
        return {"step": steps.pop()} if steps else {}

    def after_load(self, scalars: Mapping[str, float]) -> None:
        if "step" in scalars:
            for piece in self.pieces:
                # fused AdamW needs its step on the parameter's device, as an fp32 tensor
                step = torch.tensor(scalars["step"], dtype=torch.float32, device=self.device)
                self.optimizer.state[piece.master]["step"] = step
        if self.gathering is not None:
            self.gathering.finish()
        self._refresh_working_weights()

    def release(self) -> None:
        if self.gathering is not None:
            self.gathering.finish()


def _views(buckets: Sequence[Bucket[nn.Parameter]], flats: Sequence[Tensor]) -> dict[nn.Parameter, Tensor]:
    """Return the elements of each parameter in the flat tensor of its bucket, in its shape."""
    return {
        parameter: flat[where.start : where.stop].view_as(parameter)
        for bucket, flat in zip(buckets, flats, strict=True)
        for parameter, where in bucket.ranges.items()
    }


def _whole_piece(parameter: nn.Parameter, place: Place, gradient: Tensor) -> Piece:
    is_fp32 = parameter.dtype == torch.float32
    master = parameter if is_fp32 else nn.Parameter(parameter.detach().float())
    return Piece(parameter, place, 0, parameter.numel(), gradient, parameter.detach(), master)

"""What a rank has really allocated for weights, gradients and optimizer states, storage by storage.

Not by formula: every tensor that the engine, DeepSpeed or the optimizer keeps is looked up, and the bytes of
its storage are counted once, however many tensors are views of it. What no look-up finds is sought among all
tensors that Python's garbage collector knows, and reported.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jobs
from torch import Tensor

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.flat import FlatEngine
from distllm.engine.zero import ZeroEngine
from distllm.layout.grid import Coordinates
from distllm.plan.gradients import update_gradients
from distllm.plan.memory import rank_memory
from distllm.plan.rank_view import RankView

# Where DeepSpeed 0.19.8 keeps what; attributes that a class of optimizer does not have are passed over.
WEIGHTS = ("bit16_groups_flat", "bf16_groups_flat", "lp_param_buffer", "fp16_partitioned_groups_flat")
OWNERS = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
BUFFERS = ("ipg_buckets", "temp_grad_buffer_for_gpu_offload")
GRADIENTS = (
    "grads_in_partition",
    "averaged_gradients",
    "all_grad_tensors",
    "fp32_groups_gradients_flat",
    "grad_partitions_flat_buffer",
)
# In host memory where states are offloaded, besides these and the gradients that the optimizer reads.
HOST = (
    "temp_grad_buffer_for_cpu_offload",
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "accumulated_grads_in_cpu",
)
HOST_OF_STAGE_3 = ("grad_partitions_flat_buffer",)
# What both the measurement and the prediction have, in the order of tables.
KINDS = ("weights", "gradients", "update_gradients", "optimizer_states", "host")

Storages = dict[int, int]  # address -> bytes


@dataclass
class Allocated:
    """Bytes on one rank.

    weights, optimizer_states: between two steps; optimizer states with the fp32 weights that they update.
    gradients: the most until the last backward pass of a step is over, beside what is in buckets and the one
    that is being computed. update_gradients: the most from then on, where DeepSpeed makes copies.
    buffers: the most in communication buckets and staging buffers. host: of optimizer states, their gradients
    and staging buffers where these are offloaded; not in the others then.
    unknown: storages of 1% of the weights or more that no look-up has found, at an update: tensor -> bytes;
    None if nobody has looked.
    """

    weights: int = 0
    gradients: int = 0
    update_gradients: int = 0
    optimizer_states: int = 0
    host: int = 0
    buffers: int = 0
    unknown: dict[str, int] | None = None


@dataclass(frozen=True)
class Comparison:
    """numel: elements of the rank's parameters before ZeRO partitions any. predicted: by kind, in bytes."""

    numel: int
    coordinates: Coordinates
    data_parallel: int
    measured: Allocated
    predicted: dict[str, int]


def compare(rank: int, cases: Sequence[tuple[str, ...]], vocab_size: int) -> list[Comparison]:
    """Each job's memory on this rank, over two steps, and what plan/memory.py says of it."""
    gc.freeze()  # what was imported is no longer looked through
    return [_compare(overrides, vocab_size) for overrides in cases]


def _compare(overrides: tuple[str, ...], vocab_size: int) -> Comparison:
    gc.collect()
    before = storages(_live_tensors())
    config = jobs.make_config(*overrides)
    engine = jobs.build_engine(config, vocab_size)
    numel = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.places)
    watch = _Watch(engine, config, numel, before)
    for step in range(2):  # states exist from the first update on
        watch.is_update = False
        engine.train_step(jobs.microbatches(step, config, engine.groups), config.optimizer.lr)
    watch.after_steps()
    coordinates, grid = engine.groups.coordinates, engine.groups.grid
    jobs.finish(engine)
    predicted = _predict(RankView(config, vocab_size, grid, coordinates.pipeline))
    return Comparison(numel, coordinates, grid.data, watch.found, predicted)


def _predict(view: RankView) -> dict[str, int]:
    memory = rank_memory(view)
    at_update = update_gradients(view.config, view.held, view.dp_size)
    return {kind: getattr(memory, kind, at_update) for kind in KINDS}


class _Watch:
    """Samples an engine's storages at the moments of a step that matter."""

    def __init__(self, engine: Engine, config: Config, numel: int, before: Storages) -> None:
        self.engine, self.numel, self.before = engine, numel, before
        self.found = Allocated()
        self.is_offloaded, self.stage = config.zero.offload_optimizer, config.zero.stage
        self.is_update = False
        self.zero: Any = engine.zero_optimizer if isinstance(engine, ZeroEngine) else None
        self.optimizer = self.zero.optimizer if self.zero else _flat(engine).optimizer
        for parameter in engine.places:
            parameter.register_post_accumulate_grad_hook(lambda _: self.sample())
        _wrap(engine, "_optimizer_step", before=self.begin_update)
        self.optimizer.register_step_pre_hook(lambda *_: self.in_update())
        if self.zero:
            # The flat copy is alive together with what it is made of before anything refers to it.
            _wrap(self.zero, "flatten", after=lambda flat: self.sample(flat) if self.is_update else None)
        if hasattr(self.zero, "copy_grads_in_partition"):
            _wrap(self.zero, "copy_grads_in_partition", after=lambda _: self.in_reduction())

    def in_reduction(self) -> None:
        """Stage 1 reduces after the last backward pass, stage 2 in each, with the next gradient waiting."""
        self.is_update = self.stage == 1 and self.zero.is_gradient_accumulation_boundary()
        self.sample(with_parameters=self.stage == 1)

    def begin_update(self) -> None:
        self.sample()
        self.is_update = True

    def in_update(self) -> None:
        self.sample()
        if self.found.unknown is None and self.optimizer.state:  # not before the states exist
            self.found.unknown = self.find_unknown()

    def sample(self, *more: Tensor, with_parameters: bool = True) -> None:
        """Look at the gradients now; keep the most of each phase."""
        known = self.weights() | self.states() | self.buffers() | self.host()
        gradients = size(without(storages([self.gradients(with_parameters), *more]), known))
        found = self.found
        if self.is_update:
            found.update_gradients = max(found.update_gradients, gradients)
        else:
            found.gradients = max(found.gradients, gradients)
        found.buffers = max(found.buffers, size(without(self.buffers(), self.host())))
        found.host = max(found.host, size(self.host()))

    def after_steps(self) -> None:
        self.found.weights = size(self.weights())
        self.found.optimizer_states = size(without(self.states(), self.weights() | self.host()))

    def weights(self) -> Storages:
        parameters = [[p.data, getattr(p, "ds_tensor", None)] for p in self.engine.places]
        return storages([self.kept(WEIGHTS), parameters])

    def owners(self) -> list[Tensor]:
        if self.zero is None:
            return [p.master for p in _flat(self.engine).pieces if p.master.dtype != p.working.dtype]
        return list(tensors_in(self.kept(OWNERS)))

    def states(self) -> Storages:
        return storages([self.owners(), list(self.optimizer.state.values())])

    def buffers(self) -> Storages:
        return storages(self.kept(BUFFERS))

    def host(self) -> Storages:
        """What lies in host memory, told by its role: without a GPU everything does."""
        if not self.is_offloaded:
            return {}
        names = (*HOST, *HOST_OF_STAGE_3) if self.stage == 3 else HOST
        return self.states() | storages([[owner.grad for owner in self.owners()], self.kept(names)])

    def gradients(self, with_parameters: bool = True) -> list[Any]:
        found = [self.kept(GRADIENTS), [owner.grad for owner in self.owners()]]
        if self.zero is None:
            found.append(_flat(self.engine).flat_gradients)
        for p in self.engine.places if with_parameters else ():
            found.append([p.grad, getattr(p, "grad_accum", None), getattr(p, "_hp_grad", None)])
        return found

    def kept(self, names: Sequence[str]) -> list[Any]:
        """Attributes of DeepSpeed's optimizer."""
        return [getattr(self.zero, name, None) for name in names]

    def find_unknown(self) -> dict[str, int]:
        known = self.before | self.weights() | self.states() | self.buffers() | self.host()
        known |= storages(self.gradients())
        unknown: dict[str, int] = {}
        for tensor in _live_tensors():
            for address, nbytes in without(storages(tensor), known).items():
                known[address] = nbytes
                if nbytes >= 0.01 * 4 * self.numel:
                    unknown[f"{tensor.dtype} {tuple(tensor.shape)} at {address:x}"] = nbytes
        return unknown


def storages(value: Any) -> Storages:
    """The storages behind all tensors in (nested containers of) `value`, each once."""
    found: Storages = {}
    for tensor in tensors_in(value):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in lists, tuples, mappings and DeepSpeed's bucket objects, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "buffer"):
        yield from tensors_in(value.buffer)


def size(found: Storages) -> int:
    """Bytes."""
    return sum(found.values())


def without(found: Storages, known: Storages) -> Storages:
    return {address: nbytes for address, nbytes in found.items() if address not in known}


def _live_tensors() -> list[Tensor]:
    """All that the garbage collector knows and that have storage."""
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return [tensor for tensor in tensors if tensor.device.type != "meta"]


def _flat(engine: Engine) -> FlatEngine:
    assert isinstance(engine, FlatEngine), f"no way is known to the states of {type(engine)}"
    return engine


def _wrap(
    owner: object,
    name: str,
    before: Callable[[], None] = lambda: None,
    after: Callable[[Any], None] = lambda result: None,
) -> None:
    """Have a method call `before`, and `after` with its result."""
    original = getattr(owner, name)

    def wrapped(*args: Any) -> Any:
        before()
        result = original(*args)
        after(result)
        return result

    setattr(owner, name, wrapped)

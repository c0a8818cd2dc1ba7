"""What the data-parallel group sends in one training step, by ZeRO stage. Pure.

Rajbhandari et al. 2020 (arXiv:1910.02054, section 7) count for a model of Psi elements 2 Psi sent per rank
and step without ZeRO and with stages 1 and 2, and 3 Psi with stage 3. DeepSpeed 0.19.8 does otherwise at
three points, which are predicted as they are: stages 1 and 2 all-reduce gradients instead of scattering them,
3 Psi in all, and stage 2 does so for every microbatch; stage 3 also scatters those of every microbatch, but
keeps weights that are used again within 1e9 elements, so that small models are gathered once per step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from distllm.config.schema import Config
from distllm.config.stages import Stage, pipeline_stages
from distllm.layout.traffic import Amount, Transfer
from distllm.plan.gather import gathered_parameters
from distllm.plan.gradients import BYTES
from distllm.plan.parameters import Shapes, numel, stage_parameters
from distllm.plan.partition import group_partitions, is_decayed

Part = tuple[Transfer, Amount]
REDUCE, GATHER, SCATTER = (Transfer("data", kind) for kind in ("all_reduce", "all_gather", "reduce_scatter"))

# MEMORY_OPT_ALLREDUCE_SIZE in deepspeed/runtime/engine.py: BF16_Optimizer's buckets, whatever ours are.
BF16_OPTIMIZER_BUCKET = 500_000_000


def is_bf16_optimizer(config: Config) -> bool:
    """Whether DeepSpeed takes BF16_Optimizer: stage 1, bf16 weights, fp32 gradients, nothing offloaded."""
    zero, train = config.zero, config.train
    return (
        zero.stage == 1
        and train.precision == "bf16"
        and train.gradient_accumulation == "fp32"
        and not zero.offload_optimizer
    )


def data_parallel_traffic(
    config: Config, vocab_size: int, dp_size: int, stage_index: int, num_microbatches: int
) -> Iterator[Part]:
    """Gradients and weights of one rank of a pipeline stage. Of stage 3's all-gathers the calls are the most
    that can be: DeepSpeed joins some of them, by the order in which modules run."""
    stage = pipeline_stages(config.model.num_layers, config.parallel)[stage_index]
    shapes = stage_parameters(config.model, stage, vocab_size, config.parallel.tensor)
    zero, element = config.zero, BYTES[config.train.precision]
    gradient_element = BYTES[config.train.gradient_accumulation]
    if zero.stage == 0:  # engine/replicated.py
        total = numel(shapes)
        calls = -(-total // zero.bucket_size)
        yield REDUCE, Amount(calls, total * gradient_element)
    elif zero.stage == 3:
        calls, total = _scattered(config, shapes, stage, dp_size)
        yield SCATTER, Amount(calls, total * gradient_element) * num_microbatches
        gathered = gathered_parameters(config, shapes, stage, stage_index, num_microbatches)
        total = sum(_padded(n, dp_size) for n in gathered)
        yield GATHER, Amount(len(gathered), total * element)
    else:
        yield from _reduced_gradients(config, shapes, stage, dp_size, num_microbatches)
        # `all_gather_into_tensor_dp_groups` in deepspeed/runtime/utils.py: one call per optimizer group.
        parts = group_partitions(shapes, zero.stage, dp_size)
        yield GATHER, Amount(len(parts), sum(parts) * dp_size * element)


def norm_reductions(config: Config) -> Iterator[Part]:
    """Of the gradient norm, and of the flag that a gradient is not finite.

    Stage 0: engine/replicated.py. Stages 1 and 2: `get_grad_norm_direct` for each of the optimizer's two
    groups, and in bf16 the flag (engine/deepspeed_quirks.py). BF16_Optimizer: `get_global_norm_of_tensors`.
    Stage 3: in fp64, but in fp32 where the states are offloaded.
    """
    model = Transfer("model", "all_reduce")
    stage = config.zero.stage
    if stage == 0 or is_bf16_optimizer(config):
        yield model, Amount(1, 4)
    else:
        size = 8 if stage == 3 and not config.zero.offload_optimizer else 4
        flags = int(stage < 3 and config.train.precision == "bf16")
        for transfer in (REDUCE, model):
            yield transfer, Amount(2 + flags, 2 * size + 4 * flags)


def tied_gradient_traffic(config: Config, table_numel: int, dp_size: int) -> Iterator[Part]:
    """engine/tied.py and `ZeroEngine._add_up_tied_gradients`: the whole gradient of a copy, put together from
    the parts of the data-parallel ranks (`safe_get_full_grad`), and added to the other copy's."""
    stage = config.zero.stage
    element = BYTES[config.train.gradient_accumulation if stage == 0 else "fp32"]
    yield Transfer("embedding", "all_reduce"), Amount(1, table_numel * element)
    if stage in (1, 2):
        yield REDUCE, Amount(1, table_numel * element)
    elif stage == 3:
        yield GATHER, Amount(1, _padded(table_numel, dp_size) * element)


def _reduced_gradients(
    config: Config, shapes: Shapes, stage: Stage, dp_size: int, num_microbatches: int
) -> Iterator[Part]:
    """Stages 1 and 2 in buckets; stage 1 once per step, stage 2 in every backward pass."""
    zero, element = config.zero, BYTES[config.train.gradient_accumulation]
    if is_bf16_optimizer(config):
        sizes = [math.prod(shape) for shape in shapes.values()]
        yield REDUCE, Amount(len(list(_joined(sizes, BF16_OPTIMIZER_BUCKET))), sum(sizes) * element)
        return
    slices = _slices(shapes, dp_size)
    if zero.stage == 1:
        in_order = list(shapes) if not zero.overlap_comm else backward_order(shapes, stage)
        if not zero.overlap_comm:  # `reduce_gradients`: group by group
            in_order = sorted(in_order, key=lambda name: not is_decayed(shapes[name]))
        passes, times = [in_order], 1
    else:
        passes = [backward_order(shapes, stage, chunk) for chunk in range(len(stage.chunks))]
        times = num_microbatches
    for names in passes:
        calls = sum(
            len(list(_joined(slices[bucket[0]], zero.bucket_size))) if len(bucket) == 1 else 1
            for bucket in _buckets(names, shapes, zero.bucket_size)
        )
        total = sum(math.prod(shapes[name]) for name in names)
        yield REDUCE, Amount(calls, total * element) * times


def _scattered(config: Config, shapes: Shapes, stage: Stage, dp_size: int) -> tuple[int, int]:
    """Calls and elements of stage 3's reduce-scatters of one microbatch: `reduce_scatter_coalesced`."""
    calls = sum(
        len(list(_buckets(backward_order(shapes, stage, chunk), shapes, config.zero.bucket_size)))
        for chunk in range(len(stage.chunks))
    )
    return calls, sum(_padded(math.prod(shape), dp_size) for shape in shapes.values())


def backward_order(shapes: Shapes, stage: Stage, chunk: int | None = None) -> list[str]:
    """Parameters in the order in which a backward pass of a chunk (None: of all) has their gradients."""
    chunks = range(len(stage.chunks)) if chunk is None else [chunk]
    order: list[str] = []
    for index in reversed(chunks):
        is_first, is_last = stage.is_first and index == 0, stage.is_last and index == len(stage.chunks) - 1
        layers = [f"decoder.layers.{layer}." for layer in stage.chunks[index]]
        prefixes = [*(["embedding."] if is_first else []), *layers]
        prefixes += ["decoder.final_layernorm.", "output_layer."] if is_last else []
        for prefix in reversed(prefixes):
            order += sorted(
                (name for name in shapes if name.startswith(prefix)), key=lambda name: _backward_rank(name)
            )
        if is_last and not is_first and "embedding.word_embeddings.weight" in shapes:
            order.insert(0, "embedding.word_embeddings.weight")  # a tied copy, which is the output projection
    return list(dict.fromkeys(order))


_WAY_BACK = ("fc2", "fc1", "pre_mlp", "linear_proj", "linear_qkv", "input_layernorm")


def _backward_rank(name: str) -> int:
    return next((rank for rank, part in enumerate(_WAY_BACK) if part in name), len(_WAY_BACK))


def _buckets(names: Sequence[str], shapes: Shapes, bucket_size: int) -> Iterator[list[str]]:
    """`reduce_independent_p_g_buckets_and_remove_grads`: a bucket goes before it would grow too large."""
    bucket: list[str] = []
    elements = 0
    for name in names:
        size = math.prod(shapes[name])
        if bucket and elements + size > bucket_size:
            yield bucket
            bucket, elements = [], 0
        bucket.append(name)
        elements += size
    if bucket:
        yield bucket


def _joined(sizes: Iterable[int], most: int) -> Iterator[int]:
    """`allreduce_no_retain`, `allreduce_and_scatter`: a message goes once it has grown above `most`."""
    elements = 0
    for size in sizes:
        elements += size
        if elements > most:
            yield elements
            elements = 0
    if elements:
        yield elements


def _slices(shapes: Shapes, dp_size: int) -> dict[str, list[int]]:
    """Elements of each parameter by the data-parallel rank that owns them (stages 1 and 2), rank by rank."""
    slices: dict[str, list[int]] = {}
    decayed, others = group_partitions(shapes, 1, dp_size)[::-1]
    for part, wanted in ((decayed, True), (others, False)):
        offset = 0
        for name, shape in shapes.items():
            if is_decayed(shape) != wanted:
                continue
            end = offset + math.prod(shape)
            cuts = [offset, *range((offset // part + 1) * part, end, part), end]
            slices[name] = [b - a for a, b in pairwise(cuts)]
            offset = end
    return slices


def _padded(elements: int, dp_size: int) -> int:
    """Stage 3 cuts every parameter into equal parts."""
    return -(-elements // dp_size) * dp_size

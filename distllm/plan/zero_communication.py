"""The messages of the data-parallel group in one training step, by ZeRO stage. Pure.

For a model of Psi elements Rajbhandari et al. 2020 (arXiv:1910.02054, section 7) count 2 Psi sent per rank
and step without ZeRO and with stages 1 and 2, and 3 Psi with stage 3. Stages 0 and 1 (engine/flat.py) are as
counted there. DeepSpeed 0.19.8 differs at two points, which are predicted as they are: stage 2, and stage 1
with offloaded states, all-reduce gradients instead of scattering them, 3 Psi in all, and stage 2 does so for
every microbatch; stage 3 also scatters those of every microbatch, and keeps weights that are used again soon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from distllm.config.schema import Config
from distllm.layout.flat import is_flat, pack
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.layout.traffic import Amount, Transfer
from distllm.optimizers import recipe_of
from distllm.plan.gradients import BYTES
from distllm.plan.held import Held
from distllm.plan.live import gathered_parameters
from distllm.plan.partition import flat_buckets, group_partitions
from distllm.plan.rank_view import RankView

Part = tuple[Transfer, Amount]
REDUCE, GATHER, SCATTER = (Transfer("data", kind) for kind in ("all_reduce", "all_gather", "reduce_scatter"))


def data_parallel_traffic(view: RankView) -> Iterator[Part]:
    """Yield the gradients and weights of one rank of a pipeline stage.

    The number of stage 3's all-gathers is an upper bound: DeepSpeed joins some of them, depending on the
    order in which modules run.
    """
    config, held, dp_size = view.config, view.held, view.dp_size
    zero, element = config.zero, BYTES[config.train.precision]
    gradient_element = BYTES[config.train.gradient_accumulation]
    if is_flat(zero):
        buckets = flat_buckets(config, held, dp_size)
        total = sum(bucket.numel for bucket in buckets)
        if zero.stage == 1:
            yield SCATTER, Amount(len(buckets), total * gradient_element)
            yield GATHER, Amount(len(buckets), total * element)
            return
        calls = sum(-(-bucket.numel // zero.bucket_size) for bucket in buckets)
        yield REDUCE, Amount(calls, total * gradient_element)
    elif zero.stage == 3:
        calls, total = _scattered(view)
        yield SCATTER, Amount(calls, total * gradient_element) * view.num_microbatches
        gathered = gathered_parameters(view, view.num_microbatches)
        total = sum(_padded(n, dp_size) for n in gathered)
        yield GATHER, Amount(len(gathered), total * element)
    else:
        yield from _reduced_gradients(view)
        # `all_gather_into_tensor_dp_groups` in deepspeed/runtime/utils.py: one call per optimizer group.
        parts = group_partitions(held, zero.stage, dp_size)
        yield GATHER, Amount(len(parts), sum(parts) * dp_size * element)


def norm_reductions(config: Config) -> Iterator[Part]:
    """Yield the reductions of the gradient norm, and of the flag that a gradient is not finite.

    Stages 0 and 1: engine/flat.py. DeepSpeed's stages 1 and 2: `get_grad_norm_direct` for each of the
    optimizer's groups, and in bf16 the flag (engine/deepspeed_quirks.py). Stage 3: in fp64, but in fp32 where
    the states are offloaded.
    """
    model = Transfer("model", "all_reduce")
    zero_stage, num_groups = config.zero.stage, recipe_of(config.optimizer).num_groups
    if is_flat(config.zero):
        if zero_stage == 1:
            yield REDUCE, Amount(1, 4)
        yield model, Amount(1, 4)
    else:
        size = 8 if zero_stage == 3 and not config.zero.offload_optimizer else 4
        flags = int(zero_stage < 3 and config.train.precision == "bf16")
        for transfer in (REDUCE, model):
            yield transfer, Amount(num_groups + flags, num_groups * size + 4 * flags)


def tied_gradient_traffic(config: Config, table_numel: int, dp_size: int) -> Iterator[Part]:
    """Yield the messages for a tied embedding (`_add_up_tied_gradients` of each engine).

    In engine/flat.py each rank adds up its part. Under DeepSpeed the whole gradient of a copy is assembled
    from the parts of the data-parallel ranks (`safe_get_full_grad`) and added to the other copy's.
    """
    zero_stage = config.zero.stage
    if is_flat(config.zero):
        num_parts = dp_size if zero_stage == 1 else 1
        (bucket,) = pack({WORD_EMBEDDINGS: table_numel}, config.zero.bucket_size, num_parts)
        element = BYTES[config.train.gradient_accumulation]
        yield Transfer("embedding", "all_reduce"), Amount(1, bucket.part_numel * element)
        return
    element = BYTES["fp32"]
    yield Transfer("embedding", "all_reduce"), Amount(1, table_numel * element)
    if zero_stage in (1, 2):
        yield REDUCE, Amount(1, table_numel * element)
    elif zero_stage == 3:
        yield GATHER, Amount(1, _padded(table_numel, dp_size) * element)


def _reduced_gradients(view: RankView) -> Iterator[Part]:
    """Yield the buckets of DeepSpeed's stages 1 and 2: once per step, or in every backward pass."""
    config, held = view.config, view.held
    zero, element = config.zero, BYTES[config.train.gradient_accumulation]
    sizes = {name: math.prod(shape) for name, shape in held.shapes.items()}
    slices = slices_of(held, view.dp_size)
    if zero.stage == 1:
        in_order = list(sizes) if not zero.overlap_comm else backward_order(view)
        if not zero.overlap_comm:  # `reduce_gradients`: group by group
            in_order = sorted(in_order, key=lambda name: held.group_of[name])
        passes, times = [in_order], 1
    else:
        passes = [backward_order(view, chunk) for chunk in range(len(view.stage.chunks))]
        times = view.num_microbatches
    for names in passes:
        calls = sum(
            len(list(messages_of(slices[bucket[0]], zero.bucket_size))) if len(bucket) == 1 else 1
            for bucket in buckets_of(names, sizes, zero.bucket_size)
        )
        yield REDUCE, Amount(calls, sum(sizes[name] for name in names) * element) * times


def _scattered(view: RankView) -> tuple[int, int]:
    """Return calls and elements of stage 3's reduce-scatters of a microbatch: `reduce_scatter_coalesced`."""
    sizes = {name: math.prod(shape) for name, shape in view.held.shapes.items()}
    calls = sum(
        len(list(buckets_of(backward_order(view, chunk), sizes, view.config.zero.bucket_size)))
        for chunk in range(len(view.stage.chunks))
    )
    return calls, sum(_padded(numel, view.dp_size) for numel in sizes.values())


def backward_order(view: RankView, chunk: int | None = None) -> list[str]:
    """Return parameters in the order in which a chunk's backward pass (None: of all) has gradients."""
    stage = view.stage
    chunks = range(len(stage.chunks)) if chunk is None else [chunk]
    order: list[str] = []
    for index in reversed(chunks):
        is_first, is_last = stage.is_first and index == 0, stage.is_last and index == len(stage.chunks) - 1
        if is_last and not stage.is_first and view.config.model.tie_embeddings:
            order.append(WORD_EMBEDDINGS)  # a tied copy, which is the output projection
        for module in _modules_on_the_way_back(view, index, is_first, is_last):
            order += view.modules.get(module, ())
    return list(dict.fromkeys(order))


def _modules_on_the_way_back(view: RankView, chunk: int, is_first: bool, is_last: bool) -> Iterator[str]:
    if is_last:
        yield from ("output_layer", "decoder.final_layernorm")
    for layer in reversed(view.stage.chunks[chunk]):
        yield from (f"decoder.layers.{layer}.{module}" for module in reversed(view.family.layer_order))
    if is_first:
        yield from (module for module in view.modules if module.startswith("embedding."))


def buckets_of(names: Sequence[str], sizes: Mapping[str, int], bucket_size: int) -> Iterator[list[str]]:
    """Yield the buckets of `reduce_independent_p_g_buckets_and_remove_grads`.

    A bucket is sent before it would grow too large.
    """
    bucket: list[str] = []
    elements = 0
    for name in names:
        size = sizes[name]
        if bucket and elements + size > bucket_size:
            yield bucket
            bucket, elements = [], 0
        bucket.append(name)
        elements += size
    if bucket:
        yield bucket


def messages_of(sizes: Iterable[int], most: int) -> Iterator[int]:
    """Yield the messages of `allreduce_no_retain` and `allreduce_and_scatter`, sent when above `most`."""
    elements = 0
    for size in sizes:
        elements += size
        if elements > most:
            yield elements
            elements = 0
    if elements:
        yield elements


def slices_of(held: Held, dp_size: int) -> dict[str, list[int]]:
    """Return the elements of each parameter by owning data-parallel rank (stages 1 and 2), rank by rank."""
    slices: dict[str, list[int]] = {}
    parts, offsets = group_partitions(held, 1, dp_size), [0] * held.num_groups
    for name, shape in held.shapes.items():
        group = held.group_of[name]
        part, offset = parts[group], offsets[group]
        end = offset + math.prod(shape)
        cuts = [offset, *range((offset // part + 1) * part, end, part), end]
        slices[name] = [b - a for a, b in pairwise(cuts)]
        offsets[group] = end
    return slices


def _padded(elements: int, dp_size: int) -> int:
    """Return the padded size of a parameter, which stage 3 cuts into equal parts."""
    return -(-elements // dp_size) * dp_size

"""Memory for gradients on their way: buckets, copies that are sent, and the one just computed. Pure.

As DeepSpeed 0.19.8 allocates them (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py). Our stages 0 and 1
reduce the buckets in which gradients are kept, in place (engine/reduction.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from distllm.layout.flat import is_flat
from distllm.plan.gradients import BYTES
from distllm.plan.rank_view import RankView
from distllm.plan.zero_communication import (
    backward_order,
    buckets_of,
    messages_of,
    slices_of,
)


def bucket_bytes(view: RankView) -> int:
    """Return bytes of the buckets into which gradients are copied: they stay while a step runs.

    Stages 1 and 2: `setup_buckets`, two of them where communication overlaps. Stage 3: one, in the type that
    is sent.
    """
    zero, train = view.config.zero, view.config.train
    if is_flat(zero):
        return 0
    if zero.stage == 3:
        return zero.bucket_size * BYTES[train.gradient_accumulation]
    kept = train.gradient_accumulation if zero.stage == 1 else train.precision
    return (2 if zero.overlap_comm else 1) * zero.bucket_size * BYTES[kept]


def sent_copies(view: RankView) -> int:
    """Return bytes of the largest message's copies.

    Stages 1 and 2 join the gradients of a message into one tensor, and cast it where the type that is sent is
    another (`allreduce_bucket`); a gradient larger than a bucket is cut by the ranks that own its parts.
    Stage 3 casts each gradient, and joins them unless one is sent alone (`reduce_scatter_coalesced`); a
    gradient larger than a bucket is sent whole.
    """
    zero, train = view.config.zero, view.config.train
    sent, working = BYTES[train.gradient_accumulation], BYTES[train.precision]
    if is_flat(zero) or view.dp_size == 1:
        return 0
    sizes = _sizes(view)
    cast = sent if sent != working else 0
    if zero.stage == 3:
        return max(
            sum(sizes[name] for name in bucket) * (cast + sent * _is_joined(bucket, sizes, view))
            for bucket in _buckets(view)
        )
    joined = sent if zero.stage == 1 else working + cast
    slices = slices_of(view.held, view.dp_size)
    messages = (
        max(messages_of(slices[bucket[0]], zero.bucket_size))
        if len(bucket) == 1
        else sum(sizes[name] for name in bucket)
        for bucket in _buckets(view)
    )
    return joined * max(messages)


def computed_gradient(view: RankView) -> int:
    """Return bytes of the largest gradient that autograd has computed and nobody has taken over yet.

    Our stages 0 and 1 take it at once; the embedding's comes when the activations are gone, and the output
    layer's is counted with the loss. DeepSpeed's stage 1 keeps all of them, counted as such. Stages 2 and 3
    keep one that is larger than a bucket until it is sent.
    """
    working, zero = BYTES[view.config.train.precision], view.config.zero
    if zero.stage == 1 and not is_flat(zero):
        return 0
    sizes = _sizes(view)
    if is_flat(zero):
        sizes = {name: size for name, size in sizes.items() if name.startswith("decoder.")}
    return working * max(sizes.values(), default=0)


def _sizes(view: RankView) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in view.held.shapes.items()}


def _buckets(view: RankView) -> Iterator[list[str]]:
    """Yield the buckets of the backward passes of all chunks."""
    for chunk in range(len(view.stage.chunks)):
        yield from buckets_of(backward_order(view, chunk), _sizes(view), view.config.zero.bucket_size)


def _is_joined(bucket: list[str], sizes: Mapping[str, int], view: RankView) -> bool:
    return len(bucket) > 1 or sizes[bucket[0]] % view.dp_size > 0

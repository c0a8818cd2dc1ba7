"""Gradients are sent while backward passes go on; weights come back while the next forward pass begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn

from distllm.engine.gathering import WeightGathering
from distllm.engine.reduction import GradientReduction
from distllm.layout.flat import pack
from distllm.layout.groups import Role

SIZES = [2, 12, 30]
BUCKET, MESSAGE = 128, 14  # the first bucket holds two parameters, the second the large one


def reduce_step(
    rank: int, num_parts: int, is_overlapped: bool, passes: list[list[int]], num_microbatches: int
) -> tuple[list[int], list[float]]:
    """passes: of each backward pass the parameters that it reaches. Returns the number of messages that were
    on their way after each of them, and the gradients of this rank's parts in the end."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    buckets = pack({p: p.numel() for p in parameters}, BUCKET, num_parts)
    flats = [torch.zeros(bucket.numel) for bucket in buckets]
    role = Role(_world(), rank, 2)
    reduction = GradientReduction(buckets, flats, role, MESSAGE, is_overlapped)
    sent: list[int] = []
    for _ in range(2):  # what the first step has left behind must not matter
        for flat in flats:
            flat.zero_()
        sent.clear()
        reduction.begin_step(num_microbatches)
        for reached in passes:
            for index in reached:
                (flat, where) = next(
                    (flat, bucket.ranges[parameters[index]])
                    for bucket, flat in zip(buckets, flats, strict=True)
                    if parameters[index] in bucket.ranges
                )
                flat[where.start : where.stop] += (index + 1) * (rank + 1)
                reduction.gradient_added(parameters[index])
            sent.append(len(reduction._sent))
        reduction.finish()
    return sent, torch.cat(reduction.owned).tolist()


def _world() -> Any:
    return dist.group.WORLD


CASES = [
    (True, [[2], [1], [0]], 1, [1, 1, 2]),  # three chunks, the last one first
    (True, [[2, 1, 0], [2, 1, 0]], 2, [0, 2]),  # nothing before the last microbatch
    (True, [[0], [1], [2]], 1, [0, 0, 2]),  # never out of order
    (True, [[1], [0]], 1, [0, 0]),  # one parameter takes no part
    (False, [[2], [1], [0]], 1, [0, 0, 0]),
]


@pytest.mark.parametrize(("is_overlapped", "passes", "num_microbatches", "sent"), CASES)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_buckets_are_sent_when_complete(
    num_parts: int, is_overlapped: bool, passes: list[list[int]], num_microbatches: int, sent: list[int]
) -> None:
    times = [sum(reached.count(index) for reached in passes) for index in range(len(SIZES))]
    # Ranks add 1 and 2 times the parameter's number plus one: 1.5 in the mean.
    means = [[1.5 * (i + 1) * times[i]] * size for i, size in enumerate(SIZES)]
    small, large = means[0] + means[1], means[2]
    cut = {0: 0, 1: 3, 2: 4}  # three all-reduces for 30 elements
    messages = [cut[number] if num_parts == 1 else number for number in sent]
    results = run_ranks(2, reduce_step, num_parts, is_overlapped, passes, num_microbatches)
    for rank, found in enumerate(results):
        if num_parts == 1:
            expected = small + large
        elif rank == 0:
            expected = small[:8] + large[:16]
        else:  # with padding to parts of 8 and 16 elements
            expected = small[8:] + [0] * 2 + large[16:] + [0] * 2
        assert found == (messages, expected)


def update_and_gather(rank: int, is_overlapped: bool) -> tuple[list[int], list[list[float]]]:
    """Returns the number of buckets on their way after an update and after each of two modules has run, and
    the parameters in the end."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    buckets = pack({p: p.numel() for p in layers.parameters()}, BUCKET, 2)
    gathering = WeightGathering(buckets, Role(_world(), rank, 2), [layers], is_overlapped)
    for step in range(2):
        for index, owned in enumerate(gathering.owned):
            owned.fill_(10 * step + 2 * index + rank)
        gathering.start()
        pending = [len(gathering._pending)]
        x = torch.zeros(3)
        for layer in layers:
            x = layer(x)
            pending.append(len(gathering._pending))
    return pending, [p.flatten().tolist() for p in layers.parameters()]


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_a_module_waits_for_its_own_weights(is_overlapped: bool) -> None:
    first, second = [10.0] * 8 + [11.0] * 8, [12.0] * 16 + [13.0] * 4
    for pending, weights in run_ranks(2, update_and_gather, is_overlapped):
        assert pending == ([2, 1, 0] if is_overlapped else [0, 0, 0])
        assert weights == [first[:12], first[12:], second]

"""Gradients are sent while backward passes go on: what is sent when, and that it comes out as the mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn

from distllm.engine.reduction import GradientReduction

SIZES = [5, 4, 3]
BUCKET = 4  # elements 0-3, 4-7, 8-11: the second holds parts of two parameters, the third of two others


def reduce_step(
    rank: int, is_overlapped: bool, passes: list[list[int]], num_microbatches: int
) -> tuple[list[int], list[float]]:
    """passes: of each backward pass the parameters that it reaches. Returns the number of buckets that were
    on their way after each of them, and the gradient in the end."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    stops = torch.tensor(SIZES).cumsum(0).tolist()
    ranges = {p: range(stop - p.numel(), stop) for p, stop in zip(parameters, stops, strict=True)}
    flat = torch.zeros(sum(SIZES))
    world: Any = dist.group.WORLD
    reduction = GradientReduction(flat, ranges, BUCKET, world, is_overlapped)
    sent: list[int] = []
    for _ in range(2):  # what the first step has left behind must not matter
        flat.zero_()
        sent.clear()
        reduction.begin_step(num_microbatches)
        for reached in passes:
            for index in reached:
                where = ranges[parameters[index]]
                flat[where.start : where.stop] += (index + 1) * (rank + 1)
                reduction.gradient_added(parameters[index])
            sent.append(len(reduction._sent))
        reduction.finish()
    return sent, flat.tolist()


@pytest.mark.parametrize(
    ("is_overlapped", "passes", "num_microbatches", "sent"),
    [
        (True, [[2], [1], [0]], 1, [0, 1, 3]),  # three chunks, the last one first
        (True, [[2, 1, 0], [2, 1, 0]], 2, [0, 3]),  # nothing before the last microbatch
        (True, [[0], [1], [2]], 1, [0, 0, 3]),  # never out of order
        (True, [[2], [0]], 1, [0, 0]),  # one parameter takes no part
        (False, [[2], [1], [0]], 1, [0, 0, 0]),
    ],
)
def test_buckets_are_sent_when_complete(
    is_overlapped: bool, passes: list[list[int]], num_microbatches: int, sent: list[int]
) -> None:
    times = [sum(reached.count(index) for reached in passes) for index in range(len(SIZES))]
    # Ranks add 1 and 2 times the parameter's number plus one: 1.5 in the mean.
    expected = [1.5 * (i + 1) * times[i] for i, size in enumerate(SIZES) for _ in range(size)]
    for found in run_ranks(2, reduce_step, is_overlapped, passes, num_microbatches):
        assert found == (sent, expected)

"""ZeRO-3 on GPUs: at the start no rank holds the whole model, not for a moment."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch
from harness import run_ranks

pytestmark = pytest.mark.gpu(2)
LARGE = (
    "model.num_layers=24",
    "model.hidden_size=1024",
    "model.ffn_hidden_size=2816",
    "model.num_attention_heads=16",
    "model.num_query_groups=16",
    "zero.stage=3",
)
MIB = 1 << 20


def peak_of_building(rank: int) -> tuple[int, int, int]:
    """Bytes at the peak of building the model, of all its parameters in fp32, and of the largest."""
    from distllm.trainer import build

    build_model, peaks = build.build_model, list[int]()

    def measured(*arguments: Any, **keywords: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        built = build_model(*arguments, **keywords)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        return built

    build.build_model = measured
    try:
        engine = jobs.build_engine(jobs.make_config(*LARGE))
    finally:
        build.build_model = build_model
    sizes = [4 * torch.Size(place.global_shape).numel() for place in engine.places.values()]
    jobs.finish(engine)
    return peaks[0], sum(sizes), max(sizes)


@pytest.mark.parametrize("world_size", [2, pytest.param(8, marks=pytest.mark.gpu(8))])
def test_a_rank_builds_its_share_one_parameter_at_a_time(world_size: int) -> None:
    for peak, whole, largest in run_ranks(world_size, peak_of_building, on_gpus=True):
        assert whole > 1000 * MIB, "large enough to tell a share from the whole"
        # Of a parameter: its values, what they are drawn from and cut into. The rest is DeepSpeed's padding.
        assert peak < whole / world_size + 4 * largest + 64 * MIB

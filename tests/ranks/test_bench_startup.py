"""`distllm.bench.startup` starts real ranks, counts what they ask of the store, and fits it."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from distllm.bench import fake_world
from distllm.bench.startup import PHASES, run
from distllm.config import compose

LLAMA3_405B = (
    "model=llama3_405b",
    "tokenizer=bytes",
    "parallel.tensor=8",
    "parallel.sequence=true",
    "parallel.pipeline=16",
    "parallel.embedding_as_layer=true",
    "parallel.loss_as_layer=true",
    "train.precision=bf16",
    "train.global_batch_size=2048",
    "train.micro_batch_size=1",
    "zero.stage=0",
)


@pytest.mark.long
def test_table_and_growth() -> None:
    overrides = ("model=tiny", "tokenizer=bytes")
    report = run(compose.load(compose.parse("check", overrides)), 0, overrides, [1, 2, 3])
    assert "what that would be on 16,384 ranks" in report.table
    results = report.results
    assert list(results["ranks"]) == ["1", "2", "3"]
    for costs in results["ranks"].values():
        assert tuple(costs) == PHASES
        assert all(cost["wall_seconds"] > 0 for cost in costs.values())
    made = [costs["make groups"]["groups_made"] for costs in results["ranks"].values()]
    asked = [costs["make groups"]["store_operations"] for costs in results["ranks"].values()]
    assert made[1] == made[2] < 10  # however many ranks there are, a rank makes the groups that it is in
    assert all(operations >= groups for operations, groups in zip(asked, made, strict=True))
    growth = {(item["phase"], item["quantity"]): item for item in results["growth"]}
    # gloo connects each rank of a group with all others; on GPUs the large groups are NCCL's.
    assert growth["make groups", "store_operations"]["slope"] > 0
    gathered = results["ranks"]["3"]["agree on config and start"]["collective_bytes"]
    assert gathered > 3 * 64  # the hash of the configuration, from each rank


@pytest.mark.parametrize("world_size", [1024, 16_384])
def test_ranks_of_a_large_job_start_alone(world_size: int) -> None:
    """Their groups, store operations and memory have a bound that holds for any number of ranks."""
    arguments = (f"world_size={world_size}", *LLAMA3_405B)
    config = compose.load(compose.parse("check", arguments))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        ranks = (0, world_size // 2, world_size - 1)
        started = [pool.submit(fake_world.play, 0, rank, config, 256, world_size) for rank in ranks]
        played = [future.result() for future in started]
    for one in played:
        assert sum(map(len, one.groups.values())) <= 16, one
        assert fake_world.store_operations(one.groups) <= 200, one
        assert one.peak_bytes < 1 << 30, one  # the process with its libraries: weights are described only
        assert one.seconds["make groups"] + one.seconds["build model and engine"] < 20, one
    assert sum(one.pieces for one in played) > 0
    modelled = fake_world.model_start(played, world_size)
    assert modelled["rendezvous store"] + modelled["own work"] + modelled["communicators"] < 60

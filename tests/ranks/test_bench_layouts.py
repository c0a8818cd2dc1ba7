"""`distllm.bench.layouts` measures real steps on ranks that it starts itself."""

import pytest

from distllm.bench.layouts import DEFAULT_LAYOUTS, run
from distllm.bench.local_ranks import run_on_ranks
from distllm.config import compose

SMALL = ("model=tiny", "tokenizer=bytes", "train.global_batch_size=4", "train.micro_batch_size=1")


def fail_on_rank_1(rank: int) -> None:
    if rank == 1:
        raise ValueError("this rank is broken")


def never_done(rank: int) -> None:
    import time

    time.sleep(1000)


@pytest.mark.long
def test_table_and_rows() -> None:
    config = compose.load(compose.parse("check", [*SMALL, "model.num_query_groups=1"]))
    report = run(config, 300, [layout for layout in DEFAULT_LAYOUTS if layout.ranks == 2], steps=1)
    assert "DP2, ZeRO-3" in report.table
    assert "TP2, SP: not possible for this job, since" in report.table
    rows = {row["layout"]: row for row in report.results["layouts"]}
    assert {"DP2, ZeRO-0", "PP2", "PP2, 2 chunks"} <= rows.keys()
    for row in rows.values():
        assert row["ratio"] == 1
        assert row["step_seconds"]["count"] == 1
        assert 0 < row["step_seconds"]["least"] <= row["step_seconds"]["most"]


def test_a_rank_that_fails_ends_the_others_and_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*this rank is broken"):
        run_on_ranks(2, fail_on_rank_1, deadline_seconds=120)


def test_ranks_that_are_not_done_are_ended() -> None:
    with pytest.raises(RuntimeError, match="rank 0 is not done in time"):
        run_on_ranks(1, never_done, deadline_seconds=15)

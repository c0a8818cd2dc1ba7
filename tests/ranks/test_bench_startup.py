"""`distllm.bench.startup` starts real ranks, counts what they ask of the store, and fits it."""

import pytest

from distllm.bench.startup import PHASES, run
from distllm.config import compose


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
    assert made == sorted(set(made))
    assert all(operations >= groups for operations, groups in zip(asked, made, strict=True))
    growth = {(item["phase"], item["quantity"]): item for item in results["growth"]}
    # Megatron Core makes a group for every slice of the grid, and every rank takes part in each.
    groups = growth["make groups", "groups_made"]
    assert groups["growth"] == "n"
    assert groups["constant"] + 3 * groups["slope"] == pytest.approx(made[-1], rel=0.1)
    gathered = results["ranks"]["3"]["agree on config and start"]["collective_bytes"]
    assert gathered > 3 * 64  # the hash of the configuration, from each rank

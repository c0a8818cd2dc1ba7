"""One page of a profile: shares of the steps' time, and the operators that took the most."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.metrics.profile_summary import Operator, RankProfile, profile_summary, union_seconds

PROFILE = RankProfile(
    rank=0,
    stage=0,
    step_seconds=(1.0, 3.0),
    phases={"data": 0.2, "forward": 1.0, "backward": 2.0, "optimizer": 0.4},
    communication_seconds=1.2,
    device_seconds=3.0,
    peak_memory_bytes=3 * 2**30,
    operators=(Operator("aten::mm", 8, 0.5, 2.0), Operator("ncclKernel", 4, 0.0, 1.0)),
)


def test_shares_are_of_the_steps_time() -> None:
    text = profile_summary([PROFILE, replace(PROFILE, rank=2, stage=1, device_seconds=None)], range(3, 5))
    first, second = text.splitlines()[3:5]
    shares = "5.0% 25.0% 50.0% 10.0% 10.0% 30.0% 25.0%"  # data, ..., optimizer, other, communication, idle
    assert " ".join(first.split()) == f"0 0 2.000 {shares} 3.0 GiB"
    assert second.split()[:3] == ["2", "1", "2.000"]
    assert second.split()[-3:-2] == ["-"], "no device was idle"
    assert text.startswith("steps 3 to 4")


def test_operators_are_listed_by_self_time_of_host_and_device() -> None:
    text = profile_summary([PROFILE], range(3, 5))
    _, _, host, device = text.split("\n\n")
    assert host.splitlines()[2].split() == ["250.00", "100.0%", "4.0", "aten::mm"]
    assert [line.split() for line in device.splitlines()[2:]] == [
        ["1000.00", "66.7%", "4.0", "aten::mm"],
        ["500.00", "33.3%", "2.0", "ncclKernel"],
    ]
    on_cpu = replace(PROFILE, operators=(Operator("aten::mm", 8, 0.5, 0.0),))
    assert "device:" not in profile_summary([on_cpu], range(3, 5)), "there is nothing to list"


def test_a_page_is_a_page() -> None:
    operators = tuple(Operator(f"operator {number} " + "x" * 500, 1, 1.0, 1.0) for number in range(200))
    lines = profile_summary([replace(PROFILE, operators=operators)], range(3, 5)).splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) <= 110


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_a_union_counts_every_second_once(spans: list[tuple[int, int]]) -> None:
    covered = {second for begin, length in spans for second in range(begin, begin + length)}
    found = union_seconds((float(begin), float(begin + length)) for begin, length in spans)
    assert found == pytest.approx(len(covered))

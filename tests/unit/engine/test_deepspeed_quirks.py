"""What is changed inside DeepSpeed and seen without ranks. The rest: tests/ranks/test_broken_adapter.py."""

from __future__ import annotations

import subprocess
from unittest import mock

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.utils import numa

from distllm.engine.deepspeed_quirks import count_cores_once


@pytest.mark.parametrize(("fixed", "started"), [(False, 3), (True, 1)])
def test_the_number_of_devices_starts_one_process(
    fixed: bool, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setattr(
        numa, "get_numa_cores", getattr(numa.get_numa_cores, "__wrapped__", numa.get_numa_cores)
    )
    if fixed:
        count_cores_once()
        count_cores_once()  # an engine after the first
    answer = b"available: 1 nodes (0)\nnode 0 cpus: 0 1\n"
    with mock.patch.object(subprocess, "check_output", return_value=answer) as start:
        assert [CPU_Accelerator().device_count() for _ in range(3)] == [1, 1, 1]
    assert start.call_count == started

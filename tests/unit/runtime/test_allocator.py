"""Memory that tensors free is there for the next ones, without the kernel; settings of the user's stay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distllm.runtime.allocator import USERS_SETTINGS, keep_freed_memory, let_segments_grow

COUNT_FAULTS = """
import resource, sys, torch
from distllm.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    for _ in range(5):
        blocks = [torch.ones(10_000_000) for _ in range(4)]
        del blocks
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_is_not_taken_anew() -> None:
    """Blocks of 40 MB are 9,766 pages each; huge pages, if a machine has them, are fewer, but not none."""
    kept, by_default = faults("keep"), faults("leave")
    assert by_default > 100
    assert kept < by_default / 20


@pytest.mark.parametrize("name", USERS_SETTINGS)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_segments_of_cuda_memory_grow_unless_the_user_has_settings(
    before: dict[str, str], after: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(before)
    monkeypatch.setattr(os, "environ", environment)
    let_segments_grow()
    assert environment == after

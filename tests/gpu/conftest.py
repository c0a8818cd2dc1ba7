"""Tests of this folder are skipped, with one line for all, where there are fewer GPUs than they need."""

from __future__ import annotations

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures are made: pytest folds the skips of one place and reason into one line."""
    markers = item.iter_markers("gpu")
    needed = max((marker.args[0] if marker.args else 1 for marker in markers), default=1)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        pytest.skip("no GPU here: PyTorch sees none")
    if found < needed:
        pytest.skip(f"needs {needed} GPUs, and PyTorch sees {found}")

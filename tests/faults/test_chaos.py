"""The harness of tests/bench/chaos.py, for a minute."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import chaos


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_run_survives_chaos(tmp_path: Path) -> None:
    """Every 15 s a rank dies; `measure` checks that each step is there once, bit for bit, and none that a
    checkpoint held was done again."""
    result = chaos.measure(tmp_path, minutes=1, kill_every=15)
    assert result["kills"] >= 2
    assert result["starts"] == result["kills"] + 1
    assert result["steps_committed"] == 144
    assert 0.5 < result["committed_share"] < 1
    assert 0.1 < result["goodput"] < 1

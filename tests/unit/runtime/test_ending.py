"""A process that has failed ends, whatever its cleaning up waits for."""

from __future__ import annotations

import subprocess
import sys

WAITS = """
import threading
from distllm.runtime import ending

ending.end_within({seconds}, 130)
{then}
"""


def end_of(seconds: float, then: str) -> tuple[int, str]:
    program = WAITS.format(seconds=seconds, then=then)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return found.returncode, found.stderr


def test_what_waits_too_long_is_ended_and_shown() -> None:
    code, stderr = end_of(0.1, "def waits_for_ever():\n    threading.Event().wait()\nwaits_for_ever()")
    assert code == 130
    assert "in waits_for_ever" in stderr


def test_what_ends_in_time_ends_by_itself() -> None:
    assert end_of(30, "raise SystemExit(3)") == (3, "")

"""Settings that every test shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distllm.runtime import quiet

quiet.silence()
# Tests import their helpers by name, here and in the processes that they start.
TESTS = str(Path(__file__).parent)
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))

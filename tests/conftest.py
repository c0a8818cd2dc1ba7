"""Settings that every test shares."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from distllm.runtime import quiet

quiet.silence()
# Tests import their helpers by name, here and in the processes that they start.
TESTS = str(Path(__file__).parent)
sys.path.insert(0, TESTS)
# Where jobs.make_config keeps what it has composed; ranks are forked with this environment.
CONFIGS = tempfile.TemporaryDirectory(prefix="configs-")
os.environ["DISTLLM_TEST_CONFIGS"] = CONFIGS.name
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))

"""Settings that every test shares."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from distllm.runtime import light_imports, quiet

quiet.silence()
light_imports.install()
# What a shell starts in the background ignores Ctrl-C, and so would what the tests start there and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("COLUMNS", None)  # pytest-xdist sets 80 for its workers, and commands fit their lines into it
# Tests import their helpers by name, here and in the processes that they start.
TESTS = str(Path(__file__).parent)
sys.path.insert(0, TESTS)
# Where jobs.make_config keeps what it has composed; ranks are forked with this environment.
CONFIGS = tempfile.TemporaryDirectory(prefix="configs-")
os.environ["DISTLLM_TEST_CONFIGS"] = CONFIGS.name
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--alone",
        choices=["yes", "no", "also"],
        default="also",
        help="tests that need the machine for themselves: only these, none of them, or all tests",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `--alone` does: launch/test runs the other tests two at a time."""
    wanted = config.getoption("--alone")
    if wanted == "also":
        return
    chosen = [item for item in items if (item.get_closest_marker("alone") is not None) == (wanted == "yes")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs more GPUs than there are, before its fixtures are made.

    pytest folds the skips of one place and reason into one line.
    """
    needed = max((marker.args[0] if marker.args else 1 for marker in item.iter_markers("gpu")), default=0)
    if needed:
        import torch  # takes seconds, which most tests do not need

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found == 0:
            pytest.skip("no GPU here: PyTorch sees none")
        if found < needed:
            pytest.skip(f"needs {needed} GPUs, and PyTorch sees {found}")

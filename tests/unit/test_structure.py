"""The architecture holds: what may import what, what lies where, and how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distllm"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 400

SIBLINGS = {"data", "model", "engine", "checkpoint", "metrics"}
# Rooms that join some of the siblings, or that some of them build on.
ABOVE = {"optimizers", "objectives", "lineage", "huggingface", "plan"}
MAY_IMPORT = {
    "config": set(),
    "layout": {"config"},
    "runtime": {"config", "layout"},
    **{sibling: {"config", "layout", "runtime"} for sibling in SIBLINGS},
    "optimizers": {"config"},
    "engine": {"config", "layout", "runtime", "optimizers"},
    "objectives": {"config", "engine"},
    "lineage": {"config", "data", "metrics"},
    "huggingface": {"config", "layout", "model"},
    "plan": {"config", "layout", "model", "optimizers"},
    "trainer": {"config", "layout", "runtime", *ABOVE} | SIBLINGS,
    "bench": {"config", "layout", "runtime", *ABOVE, "trainer"} | SIBLINGS,
    "verbs": {"config", "layout", "runtime", *ABOVE, "trainer", "bench"} | SIBLINGS,
    "__main__": {"config", "runtime", "plan", "verbs"},
}
ONLY_IN = {
    "megatron": (
        "model/",
        "layout/groups.py",
        "layout/megatron_state.py",
        "engine/pipeline.py",
        "runtime/cpu.py",
    ),
    "deepspeed": ("engine/", "runtime/quiet.py"),
    "hydra": ("config/compose.py",),
    "omegaconf": ("config/compose.py",),
}
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "distllm", "conf", "launch", "tests", "docker"}


def imports(source: str) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: that is how this test reads them"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(path: str, source: str) -> list[str]:
    """The imports of one file that break an arrow. path: below distllm/."""
    own = path.split("/")[0].removesuffix(".py")
    broken = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "distllm" and rest and rest[0] in MAY_IMPORT and own in MAY_IMPORT:
            if rest[0] != own and rest[0] not in MAY_IMPORT[own]:
                broken.append(name)
        elif top in ONLY_IN and not path.startswith(ONLY_IN[top]):
            broken.append(name)
    return broken


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(file: Path) -> None:
    assert forbidden(str(file.relative_to(PACKAGE)), file.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/rules.py", "from distllm.layout.grid import Grid"),
        ("layout/grid.py", "def f():\n    import distllm.engine.zero"),
        ("engine/zero.py", "from distllm.model import spec"),
        ("engine/zero.py", "from distllm import model"),
        ("runtime/dist.py", "from distllm.trainer import loop"),
        ("trainer/loop.py", "import megatron.core"),
        ("plan/memory.py", "from distllm.engine import zero"),
        ("engine/zero.py", "from distllm.plan.memory import estimate_memory"),
        ("engine/zero.py", "from megatron.core import parallel_state"),
        ("model/spec.py", "import deepspeed"),
        ("verbs/train.py", "from omegaconf import OmegaConf"),
        ("config/sweep.py", "import hydra"),
        ("bench/layouts.py", "from distllm.verbs import check"),
        ("trainer/loop.py", "from distllm.bench import layouts"),
    ],
)
def test_a_broken_arrow_is_seen(path: str, source: str) -> None:
    assert forbidden(path, source)


def test_every_folder_of_the_package_has_its_arrows() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(MAY_IMPORT)


def test_the_top_of_the_repository_is_short() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    entries = {file.split("/")[0] for file in files}
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL


# The rooms of the axes themselves, and what users read of the grid.
MAY_NAME_THE_DATA_AXIS = ("layout/", "plan/rank_view.py", "trainer/describe.py", "verbs/check.py")


def test_roles_are_asked_for_instead_of_the_data_axis() -> None:
    """A further axis (context, expert) changes who reads other samples and over whom gradients are reduced:
    who asks `Groups` for the role has nothing to change."""
    pattern = re.compile(r"\b(grid|coordinates|groups)\.data\b")
    named = {str(f.relative_to(PACKAGE)) for f in FILES if pattern.search(f.read_text())}
    assert {file for file in named if not file.startswith(MAY_NAME_THE_DATA_AXIS)} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE

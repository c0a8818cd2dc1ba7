"""The wheel: built from this checkout, installed into an empty environment, used from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from distllm import __version__

ROOT = Path(__file__).parents[2]


def run(command: Sequence[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.long
def test_an_installed_wheel_composes_jobs_from_any_folder(tmp_path: Path) -> None:
    dist = str(tmp_path / "dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, str(ROOT)], tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], tmp_path)
    # The dependencies are those of the environment that runs the tests; a plain path line makes them visible
    # without the .pth files in there, so that an editable distllm of that environment stays out.
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    located = run([python, "-c", "import distllm; print(distllm.__file__)"], elsewhere)
    assert Path(located.strip()).is_relative_to(site_packages)
    program = tmp_path / "venv" / "bin" / "distllm"
    assert run([program, "--version"], elsewhere) == f"distllm {__version__}\n"
    shown = run([program, "train", "--cfg", "job", "+experiment=quickstart", "model=tiny"], elsewhere)
    assert "\n  hidden_size: 64\n" in shown
    shipped = sorted(str(file.relative_to(ROOT / "conf")) for file in (ROOT / "conf").rglob("*.yaml"))
    installed = site_packages / "distllm" / "conf"
    assert sorted(str(file.relative_to(installed)) for file in installed.rglob("*.yaml")) == shipped
    assert os.listdir(elsewhere) == []

"""Checkpoints of earlier formats are resumed, generated from, exported, verified and shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import make_formats as make
import pytest
from commands import fork
from runs import curve, events

from distllm.checkpoint.manifest import FORMAT_VERSION, read_manifest

KEPT = sorted(path for folder in make.HERE.glob("format_*") for path in folder.iterdir())


@pytest.fixture(params=KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run of an earlier version as its user finds it, beside its corpus."""
    kept: Path = request.param
    shutil.copytree(kept, tmp_path / kept.name)
    make.write_corpus(tmp_path)
    return kept


def test_the_last_format_before_this_one_is_kept() -> None:
    wanted = {f"format_{version}" for version in range(3, FORMAT_VERSION)}
    assert {path.parent.name for path in KEPT} >= wanted


def test_it_goes_on_as_it_would_have(kept: Path, tmp_path: Path) -> None:
    """To 1e-5: the same steps on another processor, from the same fp32 state."""
    expected = curve(kept)
    assert [row[0] for row in expected] == list(range(1, make.STEPS + 1))
    end = fork(tmp_path, "train", *make.JOB, *make.RUNS[kept.name], f"run.dir={kept.name}")
    assert end.exit_code == 0, end.output
    for ours, theirs in zip(curve(tmp_path / kept.name), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    (start,) = events(tmp_path / kept.name, "start")
    assert start["reason"].endswith(f"step_{make.SAVED:08}")
    # What this version knows besides is not told as a change of the user's.
    assert events(tmp_path / kept.name, "changed settings") == []
    newest = read_manifest(tmp_path / kept.name / "checkpoints" / f"step_{make.STEPS:08}")
    assert newest.format_version == FORMAT_VERSION


def test_it_is_read_by_the_other_verbs(kept: Path, tmp_path: Path) -> None:
    run = f"run.dir={kept.name}"
    for arguments in (
        ("generate", run, "generate.prompt=def", "generate.max_tokens=4"),
        ("export", run, "export.path=exported"),
        ("checkpoint", "verify", run),
        ("checkpoint", "show", run),
        ("checkpoint", "list", run),
    ):
        end = fork(tmp_path, *arguments)
        assert end.exit_code == 0, end.output
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["model_type"] == kept.name
    assert read_manifest(
        tmp_path / kept.name / "checkpoints" / f"step_{make.SAVED:08}"
    ).format_version == int(kept.parent.name.removeprefix("format_"))

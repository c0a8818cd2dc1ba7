"""The folder of a run: created or refused, and never half-written."""

import json
import math
import os
from pathlib import Path

import pytest

import distllm
from distllm.config.problems import UserError
from distllm.metrics.environment import git_commit, relevant_variables
from distllm.metrics.jsonl import write_atomically
from distllm.metrics.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "first")


def test_the_folder_is_created_and_left_empty(run: RunDirectory) -> None:
    assert run.path.is_dir()
    assert list(run.path.iterdir()) == []


def test_a_reader_creates_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "absent", create=False)
    assert run.read_status() is None
    assert run.read_events() == []
    assert not run.path.exists()


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory") as caught:
        RunDirectory(tmp_path / "file" / "run")
    assert caught.value.problems[0].setting == "run.dir"


def test_a_read_only_mount_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(path: Path, content: bytes) -> int:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(UserError, match="Read-only file system") as caught:
        RunDirectory(tmp_path)
    assert caught.value.problems[0].value == tmp_path


def test_status_tells_the_last_state(run: RunDirectory) -> None:
    run.write_status("running", "started", world_size=4)
    run.write_status("failed", "loss is not finite", step=7, loss=math.nan, at=Path("x"))
    status = run.read_status()
    assert status is not None
    assert (status["state"], status["reason"], status["step"]) == ("failed", "loss is not finite", 7)
    assert (status["loss"], status["at"]) == ("NaN", "x")
    assert "world_size" not in status
    assert status["time"].endswith("+00:00")


def test_a_failed_replacement_leaves_the_old_file(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_config("old: 1\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run.write_config("new: 2\n")
    assert run.config_path.read_text() == "old: 1\n"
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]


def test_others_may_read_what_is_written_atomically(tmp_path: Path) -> None:
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"x")
    write_atomically(atomic, b"x")
    assert atomic.stat().st_mode == plain.stat().st_mode


def test_events_survive_a_torn_line(run: RunDirectory) -> None:
    run.event("start", "first launch", world_size=2)
    with open(run.events_path, "ab") as file:
        file.write(b'{"time": "2025-')
    run.event("fault", "loss spike", ranks=[0, 3], losses={"3": math.inf})
    start, fault = run.read_events()
    assert (start["kind"], start["world_size"]) == ("start", 2)
    assert (fault["kind"], fault["ranks"], fault["losses"]) == ("fault", [0, 3], {"3": "Infinity"})


def test_environment_tells_versions_and_machine(run: RunDirectory) -> None:
    run.write_environment({"backend": "gloo"})
    environment = json.loads(run.environment_path.read_text())
    assert environment["backend"] == "gloo"
    assert environment["versions"]["python"].startswith("3.")
    assert environment["versions"]["distllm"] == distllm.__version__
    assert set(environment["versions"]) >= {"torch", "deepspeed", "megatron-core", "hydra-core"}
    assert environment["usable_cores"] >= 1
    assert environment["memory_bytes"] > 2**28
    assert environment["processor"]


def test_only_relevant_variables_are_kept_and_never_a_secret() -> None:
    environment = {
        "WORLD_SIZE": "4",
        "NCCL_DEBUG": "INFO",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "2",
        "SLURM_JWT": "ey...",
        "NCCL_AUTH_TOKEN": "s",
        "WANDB_API_KEY": "s",
        "MY_WORLD_SIZE": "5",
        "HF_TOKEN": "s",
    }
    assert list(relevant_variables(environment)) == [
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "SLURM_JOB_ID",
        "WORLD_SIZE",
    ]


def test_a_folder_inside_a_checkout_has_no_commit_of_its_own(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()  # not a repository: git fails, the run goes on
    assert git_commit(tmp_path) is None
    assert git_commit(tmp_path / "site-packages") is None

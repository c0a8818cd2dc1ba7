"""`-m`: what each job of a sweep is, where it lies, and what becomes of their exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from distllm.config import compose, sweep
from distllm.config.problems import UserError

SAVES_WHEN_TERMINATED = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


class Jobs:
    """Stands for the processes: keeps their command lines and ends them with the given codes."""

    def __init__(self, codes: list[int]) -> None:
        self.codes = iter(codes)
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command)
        return next(self.codes)


def run(monkeypatch: pytest.MonkeyPatch, codes: list[int], *arguments: str) -> tuple[int, Jobs]:
    jobs = Jobs(codes)
    monkeypatch.setattr(sweep, "_run_process", jobs)
    return sweep.run(compose.parse("train", ["-m", *arguments])), jobs


def test_each_job_is_a_command_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = f"{tmp_path}/a b, c"
    swept = ["optimizer.lr=1e-3,2e-3", "model=tiny", f"run.dir='{directory}'"]
    code, jobs = run(monkeypatch, [0, 0], *swept)
    assert code == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for command, rate in zip(jobs.commands, (0.001, 0.002), strict=True):
        assert command[:4] == [sys.executable, "-m", "distllm", "train"]
        shown = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True, check=True).stdout
        config = compose.from_yaml(shown)
        assert (config.optimizer.lr, config.model.hidden_size) == (rate, 64)
        assert config.run.dir == f"{directory}/optimizer.lr={rate}"
    assert os.listdir(tmp_path) == ["a b, c"]
    assert os.listdir(directory) == ["multirun.yaml"]
    saved = yaml.safe_load(Path(directory, "multirun.yaml").read_text())
    assert "++optimizer.lr=1e-3,2e-3" in saved["hydra"]["overrides"]["task"]


def test_unwieldy_names_become_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = f"logging.sample_prompt={'x' * 130},y"
    _, jobs = run(monkeypatch, [0, 0], prompts, f"run.dir={tmp_path}")
    assert [command[-1] for command in jobs.commands] == [
        f"run.dir='{tmp_path}/{number}'" for number in (0, 1)
    ]


@pytest.mark.parametrize(
    ("codes", "worst"), [([0, 0, 0], 0), ([0, 2, 0], 2), ([2, 1, 0], 1), ([137, 2, 0], 137), ([0, 0, 3], 3)]
)
def test_the_exit_code_is_the_worst(
    codes: list[int], worst: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, jobs = run(monkeypatch, codes, "train.seed=1,2,3", f"run.dir={tmp_path}")
    assert code == worst
    assert len(jobs.commands) == 3


def test_preemption_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, jobs = run(monkeypatch, [0, 3], "train.seed=1,2,3", f"run.dir={tmp_path}")
    assert code == 3
    assert len(jobs.commands) == 2


def test_nothing_starts_before_all_jobs_are_sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(monkeypatch, [], "train.steps=10,0,many", "fault.hang_seconds=0", f"run.dir={tmp_path}/run")
    assert [problem.setting for problem in caught.value.problems] == [
        "fault.hang_seconds",
        "train.steps",
        "train.steps",
    ]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["run.dir=a,b"], "run.dir"),
        (["optimizer.lr=interval(0,1)"], "overrides"),
        (["model=tiny,tyny"], "model"),
        (["hydra/launcher=none"], "hydra/launcher"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    arguments: list[str], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        run(monkeypatch, [], *arguments)
    assert [problem.setting for problem in caught.value.problems] == [setting]


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_a_sweep_is_no_job_for_a_launcher(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match="single-process"):
        run(monkeypatch, [], "train.seed=1,2")


def test_exit_codes_of_processes() -> None:
    assert sweep._run_process([sys.executable, "-c", "raise SystemExit(2)"]) == 2
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert sweep._run_process([sys.executable, "-c", killed]) == 128 + signal.SIGKILL


def test_sigterm_reaches_the_job(tmp_path: Path) -> None:
    """A pre-empted sweep lets its job end in its own way: the job's code tells."""
    ready = tmp_path / "ready"

    def preempt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    assert sweep._run_process([sys.executable, "-c", SAVES_WHEN_TERMINATED, str(ready)]) == 3
    thread.join()

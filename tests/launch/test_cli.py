"""`distllm` as its users start it: a process of its own in an empty folder, alone or under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import assert_light

from distllm import __version__
from distllm.config.verbs import VERBS

ROOT = Path(__file__).parents[2]


def start(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def distllm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return start(["-m", "distllm", *arguments], folder)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_verb(flag: str, tmp_path: Path) -> None:
    result = distllm(tmp_path, flag)
    assert (result.returncode, result.stderr) == (0, "")
    for verb in VERBS.values():
        assert f"\n  {verb.name:<12}{verb.help}\n" in result.stdout
        assert all(f"\n  {line}\n" in result.stdout for line in verb.usage_lines)
    actions = "train|layouts|recompute|checkpoint|data|startup"
    assert f"\n  distllm bench {actions} [overrides]\n" in result.stdout


def test_no_verb_is_answered_with_help(tmp_path: Path) -> None:
    result = distllm(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == distllm(tmp_path, "--help").stdout


def test_the_version_is_ours(tmp_path: Path) -> None:
    assert distllm(tmp_path, "--version").stdout == f"distllm {__version__}\n"


def test_help_of_a_verb_shows_groups_and_settings(tmp_path: Path) -> None:
    result = distllm(tmp_path, "train", "--help", "model=tiny")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("distllm train: pretrain a model")
    assert "\nmodel: gpt2_124m, llama3_405b," in result.stdout
    assert (
        "\nexperiment: bench_125m, bench_1b, bench_760m, laptop, llama3_8b_64gpus, quickstart\n"
        in result.stdout
    )
    assert "\n  hidden_size: 64\n" in result.stdout


def test_the_config_of_a_command_is_shown(tmp_path: Path) -> None:
    result = distllm(
        tmp_path, "train", "--cfg", "job", "+experiment=quickstart", "train.steps=5", "--resolve"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "\n  steps: 5\n" in result.stdout
    assert "\n  dir: runs/quickstart\n" in result.stdout
    section = distllm(tmp_path, "train", "--cfg", "job", "--package", "run")
    assert section.stdout == "# @package run\ndir: runs/default\n"


def test_what_hydra_knows_of_a_job_is_shown(tmp_path: Path) -> None:
    result = distllm(tmp_path, "train", "--info", "defaults", "model=tiny")
    assert result.returncode == 0
    assert "model/tiny" in result.stdout


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"], ["--info", "config"], []])
def test_a_mistake_is_one_message_and_nothing_is_written(flags: list[str], tmp_path: Path) -> None:
    result = distllm(tmp_path, "train", *flags, "model=tny", "train.step=5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "distllm: 2 problems with this job:\n"
        "  1. model=tny\n"
        "    rule: must be one of gpt2_124m, llama3_405b, llama3_70b, llama3_8b, quickstart, tiny\n"
        "    fix:  model=tiny\n"
        "  2. train.step=5\n"
        "    rule: is not a setting of distllm\n"
        "    fix:  did you mean train.steps?\n"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags", [["--cfg", "job", "-m"], ["--resolve"], ["--cfg", "jobs"], ["--stepz=5"]])
def test_flags_that_make_no_sense_are_refused(flags: list[str], tmp_path: Path) -> None:
    result = distllm(tmp_path, "train", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith("distllm: 1 problem with this job:\n  1. arguments=")


def test_a_mistake_of_many_ranks_is_printed_once(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    result = start(
        [*torchrun, "-m", "distllm", "train", "train.step=5", "train.global_batch_size=3"], tmp_path
    )
    assert result.returncode != 0
    assert result.stderr.count("problems with this job") == 1
    assert result.stderr.count("train.step=5") == 1
    assert "4 x 2 = 8" in result.stderr  # the rules know the world size
    # The report that follows is torchrun's own; none of our files is in a traceback.
    assert str(ROOT / "distllm") not in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "code",
    [
        "import distllm",
        "from distllm.__main__ import main; main(['--help'])",
        "from distllm.__main__ import main; main(['train', '--cfg', 'job'])",
        "from distllm.__main__ import main; main(['train', 'train.step=5'])",
        "from distllm.__main__ import main; main(['config'])",
    ],
)
def test_an_answer_needs_nothing_heavy_and_no_second(code: str, tmp_path: Path) -> None:
    assert_light(code, tmp_path)

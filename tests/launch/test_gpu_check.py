"""launch/gpu-check: what it refuses, what it would run, and what it keeps of it; all without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_results
import pytest
from commands import ROOT, environment
from gpu_results import BENCHES, Bench

from distllm.config.compose import load, parse
from distllm.verbs.check import report, vocabulary_size

CASE = '<testcase classname="tests.gpu.test_a" name="test_{}" time="{}">{}</testcase>'
CASES = [
    CASE.format("x[1]", 1.5, ""),
    CASE.format("y", 0.2, '<failure message="short">a long story</failure>'),
    CASE.format("z", 0, '<skipped message="needs 4 GPUs">the place</skipped>'),
    CASE.format("e", 0, '<error message="a fixture"/>'),
]
JUNIT = f'<?xml version="1.0"?><testsuites><testsuite>{"".join(CASES)}</testsuite></testsuites>'


def test_without_a_gpu_the_script_says_so_and_sets_nothing_up(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    place = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([ROOT / "launch" / "gpu-check"], env=place, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "gpu-check: no GPU here: nvidia-smi names none\n"


def test_without_a_gpu_that_pytorch_sees_no_file_is_written(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "bench" / "gpu_check.py"), str(tmp_path / "out.json")]
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("gpu-check: no GPU here: PyTorch")
    assert list(tmp_path.iterdir()) == []


def test_the_most_gpus_that_tests_are_made_for() -> None:
    counts = (0, 1, 2, 3, 4, 7, 8, 16)
    assert [gpu_results.gpus_to_use(count) for count in counts] == [0, 1, 2, 2, 4, 4, 8, 8]
    assert gpu_results.visible_devices(2, None) == "0,1"
    assert gpu_results.visible_devices(2, "3,GPU-8,5") == "3,GPU-8"


@pytest.mark.parametrize("num_gpus", gpu_results.COUNTS)
@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: f"{bench.recipe}-{bench.seq_length}")
def test_every_bench_is_legal_in_bf16_and_has_the_same_tokens_a_step(bench: Bench, num_gpus: int) -> None:
    _, _, *overrides = bench.arguments
    config = load(parse("check", [*overrides, f"world_size={num_gpus}"]))
    text = report(config, vocabulary_size(config.tokenizer), num_gpus)
    assert text.startswith("distllm check: legal\n")
    assert (config.train.precision, config.model.seq_length) == ("bf16", bench.seq_length)
    recipe = load(parse("config", [f"+experiment={bench.recipe}"]))
    tokens = config.train.global_batch_size * bench.seq_length
    assert tokens == recipe.train.global_batch_size * recipe.model.seq_length


def test_results_of_tests_are_read() -> None:
    tests = gpu_results.read_tests(JUNIT)
    assert [test["outcome"] for test in tests] == ["passed", "failed", "skipped", "error"]
    assert tests[0] == {"name": "tests.gpu.test_a::test_x[1]", "seconds": 1.5, "outcome": "passed"}
    assert [test.get("message") for test in tests[1:]] == ["a long story", "needs 4 GPUs", "a fixture"]


def test_results_are_put_together_and_told(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"results": {"tokens_per_second": 1234.5, "mfu": None}}))
    good = gpu_results.bench_row(BENCHES[0], 2, 0, "", file)
    bad = gpu_results.bench_row(BENCHES[1], 2, 1, "out of memory", tmp_path / "none.json")
    late = gpu_results.bench_row(BENCHES[1], 2, None, "", file)
    assert good["report"]["results"]["tokens_per_second"] == 1234.5
    assert (bad["output"], "report" in bad, "report" in late) == ("out of memory", False, False)
    passed, *others = gpu_results.read_tests(JUNIT)
    assert gpu_results.is_good({"tests": [passed], "benches": [good]})
    assert not gpu_results.is_good({"tests": [passed], "benches": [good, bad]})
    assert not gpu_results.is_good({"tests": [passed, *others], "benches": [good]})
    assert not gpu_results.is_good({"tests": [others[1]], "benches": [good]}), "nothing was tested"
    assert gpu_results.summary({"tests": [passed, *others], "benches": [good, bad]}).splitlines() == [
        "1 passed, 1 failed, 1 error, 1 skipped",
        "  failed: tests.gpu.test_a::test_y",
        "  error: tests.gpu.test_a::test_e",
        "bench_125m, 2048 tokens a sequence, 2 GPUs: 1,234 tokens/s",
        "bench_125m, 4096 tokens a sequence, 2 GPUs: failed, exit code 1",
    ]

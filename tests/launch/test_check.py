"""`distllm check` as its users start it: a process of its own, without torch, in a moment."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from test_cli import distllm, start

LONGEST_SECONDS = 2.0
LARGE = ["tokenizer.vocab_size=128256", "train.precision=bf16", "train.micro_batch_size=1"]
CUT = ["parallel.tensor=8", "parallel.sequence=true"]
INTERLEAVED = ["parallel.pipeline=4", "parallel.virtual_pipeline=5"]
LLAMA_70B = ["model=llama3_70b", *LARGE, *CUT, *INTERLEAVED, "train.global_batch_size=1024", "world_size=256"]
LLAMA_405B = ["model=llama3_405b", *LARGE, *CUT, "parallel.pipeline=16", "train.global_batch_size=2048"]
ENDS = ["parallel.embedding_as_layer=true", "parallel.loss_as_layer=true"]


def test_a_legal_job_is_laid_out(tmp_path: Path) -> None:
    result = distllm(tmp_path, "check", *LLAMA_70B)
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    assert text.startswith("distllm check: legal\n")
    assert "70.55B parameters, vocabulary 128,256\n" in text
    assert "256 ranks = tensor 8 x pipeline 4 x data 8, sequence parallel\n" in text
    assert "replica 7  [ 56  57  58 ...  63]" in text
    assert "stages 0 to 3  20 layers each in 5 chunks: 4, 4, 4, 4, 4\n" in text
    assert "128 microbatches x 1 sequence x 8 data-parallel ranks\n" in text
    assert "8,388,608 tokens a step" in text
    assert "0.47% of each step is waiting" in text
    rows = {
        row: re.search(rf"^ +{row} +(.*)$", text, re.MULTILINE) for row in ("weights", "total on the device")
    }
    assert all(row and len(row[1].split("  ")) >= 3 for row in rows.values()), text
    sent = text[text.index("\nsent ") :].splitlines()[1:]
    assert re.match(r"sent +[\d.]+ TiB by each rank of stage \d, which sends most, in a step", sent[0])
    assert [line.split()[0] for line in sent[1:]] == ["data", "model", "pipeline", "tensor"]
    assert "reduce_scatter" in sent[-1]
    assert max(map(len, text.splitlines())) <= 120
    assert os.listdir(tmp_path) == []


def test_a_refused_job_is_told_all_reasons_and_the_way_out(tmp_path: Path) -> None:
    result = distllm(tmp_path, "check", *LLAMA_405B, "train.steps=0", "world_size=16384")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("distllm: 2 problems with this job:\n")
    assert "nearest" not in result.stderr  # a job of which not every setting is known
    result = distllm(tmp_path, "check", *LLAMA_405B, "parallel.tensor=16", "world_size=16384")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("distllm: 2 problems with this job:\n  1. parallel.tensor=16\n")
    assert "  2. parallel.pipeline=16\n" in result.stderr
    (first, *_) = re.findall(r"^  1\. (.*)\n     distance [\d.]+; [\d.]+ GiB", result.stderr, re.MULTILINE)
    assert first == "parallel.tensor=8 " + " ".join(ENDS)
    again = distllm(tmp_path, "check", *LLAMA_405B, "parallel.tensor=16", *first.split(), "world_size=16384")
    assert again.returncode == 0


def test_train_refuses_for_the_same_reasons(tmp_path: Path) -> None:
    mistakes = ["parallel.tensor=3", "parallel.sequence=true", "zero.stage=0", "zero.offload_optimizer=true"]
    check = distllm(tmp_path, "check", *mistakes)
    train = distllm(tmp_path, "train", *mistakes)
    assert train.returncode == check.returncode == 2
    assert check.stderr.startswith(train.stderr)
    assert check.stderr.removeprefix(train.stderr).startswith("nearest legal layouts")


@pytest.mark.parametrize("legal", [True, False])
def test_the_largest_job_is_answered_at_once_and_without_torch(legal: bool, tmp_path: Path) -> None:
    arguments = ["check", *LLAMA_405B, *(ENDS if legal else []), "world_size=16384"]
    code = (
        f"import sys; from distllm.__main__ import main; main({arguments!r}); print('torch' in sys.modules)"
    )
    before, start_time = os.times(), time.monotonic()
    result = start(["-c", code], tmp_path)
    seconds, after = time.monotonic() - start_time, os.times()
    assert result.stdout.splitlines()[-1] == "False"
    assert ("legal" in result.stdout) == legal
    # Processor time too: a machine that is busy with other tests lets the process wait.
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    assert min(seconds, processor) < LONGEST_SECONDS


def test_the_world_size_is_that_of_the_launcher_unless_it_is_given(tmp_path: Path) -> None:
    assert "1 rank = " in distllm(tmp_path, "check").stdout
    assert "2 ranks = " in distllm(tmp_path, "check", "world_size=2").stdout
    code = "import os; os.environ['WORLD_SIZE'] = '4'; from distllm.__main__ import main; main(['check'])"
    assert "4 ranks = " in start(["-c", code], tmp_path).stdout


@pytest.mark.parametrize("written", ["0", "-1", "two", "", "1.5"])
def test_a_world_of_no_ranks_is_refused(written: str, tmp_path: Path) -> None:
    result = distllm(tmp_path, "check", f"world_size={written}")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"world_size={written}\n" in result.stderr


def test_only_check_takes_a_world_size(tmp_path: Path) -> None:
    result = distllm(tmp_path, "train", "world_size=2")
    assert result.returncode == 2
    assert "world_size=2\n    rule: is not a setting of distllm" in result.stderr


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary"),
    [
        ("tokenizer=bytes", "257, padded to 384"),
        ("tokenizer=bytes tokenizer.special_tokens=[a,b]", "259, padded to 384"),
        ("tokenizer.vocab_size=1000", "1,000, padded to 1,024"),
        ("tokenizer.vocab_size=null tokenizer.path={folder}", "258, padded to 384"),
        ("tokenizer=huggingface tokenizer.path={folder}", "258, padded to 384"),
    ],
)
def test_the_vocabulary_is_known_without_training_a_tokenizer(
    tokenizer: str, vocabulary: str, tmp_path: Path
) -> None:
    save = (
        "import sys, pathlib; from distllm.data.tokenizer_training import byte_tokenizer; "
        "byte_tokenizer(['x1'], '<|endoftext|>').save(pathlib.Path('tokenizer'))"
    )
    assert start(["-c", save], tmp_path).returncode == 0
    result = distllm(tmp_path, "check", *tokenizer.format(folder=tmp_path / "tokenizer").split())
    assert result.returncode == 0, result.stderr
    assert f"vocabulary {vocabulary}\n" in result.stdout


def test_the_data_need_not_exist(tmp_path: Path) -> None:
    assert distllm(tmp_path, "check", "data=text", "data.path=/nowhere/*.txt").returncode == 0


def test_a_sweep_is_no_job(tmp_path: Path) -> None:
    result = distllm(tmp_path, "check", "-m", "parallel.tensor=1,2", "world_size=2")
    assert (result.returncode, result.stdout) == (2, "")
    assert "one job at a time" in result.stderr
    assert os.listdir(tmp_path) == []


LLAMA_8B = ["model=llama3_8b", *LARGE, "train.global_batch_size=1024"]
H100 = "cluster=h100_80gb"


def test_a_job_that_fits_its_device_is_told_how_much_is_left(tmp_path: Path) -> None:
    job = ["check", *LLAMA_8B, "parallel.tensor=2", "parallel.sequence=true", "world_size=64"]
    plain, compared = distllm(tmp_path, *job), distllm(tmp_path, *job, H100)
    assert (plain.returncode, compared.returncode) == (0, 0)
    assert "fits:" not in plain.stdout
    assert "communicators" not in plain.stdout
    assert re.search(r"^ +fits: [\d.]+ of 79\.1 GiB on the fullest rank$", compared.stdout, re.MULTILINE)
    assert re.search(r"^ +communicators +[\d.]+ GiB$", compared.stdout, re.MULTILINE)
    assert "estimated" in compared.stdout
    outside = [text.partition("\nmemory ")[0] for text in (plain.stdout, compared.stdout)]
    assert outside[0] == outside[1]


def test_a_job_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path) -> None:
    job = [*LLAMA_8B, H100]
    result = distllm(tmp_path, "check", *job, "world_size=64")
    assert (result.returncode, result.stdout) == (2, "")
    assert "  1. cluster.memory_gib=79.1\n    rule: must be at least the " in result.stderr
    assert "nearest legal layouts that fit" in result.stderr
    (fix,) = re.findall(r"^    fix:  (.*)$", result.stderr, re.MULTILINE)
    again = distllm(tmp_path, "check", *job, *fix.split(), "world_size=64")
    assert (again.returncode, again.stderr) == (0, "")


def test_train_refuses_before_it_starts(tmp_path: Path) -> None:
    result = distllm(tmp_path, "train", *LLAMA_8B, H100, "data=stdlib")
    assert (result.returncode, result.stdout) == (2, "")
    assert "cluster.memory_gib=79.1\n    rule: must be at least the " in result.stderr
    assert re.search(r"^    fix:  .* on \d+ processes$", result.stderr, re.MULTILINE)
    assert os.listdir(tmp_path) == []

"""`distllm checkpoint list|show|verify|prune` on a run of four checkpoints, as its users start it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from commands import assert_light, fork

from distllm.metrics.run_lock import RunLock

STEPS = (2, 4, 6, 8)
SHARD = "shards/rank_00000.distcp"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`: checkpoints after 2, 4, 6 and 8 steps, of which those of every 4 stay."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "corpus").mkdir()
    for number in range(20):
        (folder / "corpus" / f"{number:02}.txt").write_text("def return if else for while import\n" * 40)
    result = fork(
        folder,
        "train",
        "model=tiny",
        "tokenizer=bytes",
        "data=text",
        "data.path=corpus/*.txt",
        "data.validation_fraction=0",
        "data.cache=cache",
        "train.steps=8",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.validation_interval=0",
        "checkpoint.interval=2",
        "checkpoint.keep=4",
        "checkpoint.keep_every=4",
        "logging.sample_tokens=0",
        "run.dir=run",
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path


def answer(folder: Path, action: str, *overrides: str, exit_code: int = 0) -> str:
    result = fork(folder, "checkpoint", action, "run.dir=run", *overrides)
    assert result.exit_code == exit_code, result.output
    return result.stdout if exit_code < 2 else result.stderr


def path_of(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"step_{step:08}"


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "run" / "checkpoints").iterdir())


def flip(path: Path) -> None:
    content = bytearray((path / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (path / SHARD).write_bytes(content)


def test_the_list_has_a_row_for_each(trained: Path) -> None:
    head, *rows = answer(trained, "list").splitlines()
    assert head.split() == ["step", "size", "layout", "written", "reason", "kept", "state"]
    assert [int(row.split()[0]) for row in rows] == list(STEPS)
    for row in rows:
        assert "  2.8 MiB  1 data x 1 tensor x 1 pipeline, ZeRO 1, fp32  " in row
        assert re.search(r"  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  interval  ", row)
        assert row.endswith("complete")
    assert ["for good" in row for row in rows] == [False, True, False, True]
    rows = answer(trained, "list", "checkpoint.keep_every=6").splitlines()[1:]
    assert ["for good" in row for row in rows] == [False, False, True, False]


def test_the_list_tells_what_is_wrong_at_a_glance(folder: Path) -> None:
    (path_of(folder, 4) / SHARD).unlink()
    path_of(folder, 6).rename(path_of(folder, 6).with_suffix(".tmp"))
    manifest = path_of(folder, 8) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 8', '"step": 9', 1))
    rows = answer(folder, "list").splitlines()[1:]
    assert rows[0].endswith("complete")
    assert rows[1].endswith(f"damaged: {SHARD}: is missing")
    assert rows[2].endswith("unfinished")
    assert "damaged: manifest.json: ValueError('its content was altered')" in rows[3]


@pytest.mark.parametrize("action", ["list", "show", "verify"])
def test_a_run_without_checkpoints_says_so(action: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert answer(tmp_path, action) == "no checkpoints in run/checkpoints\n"
    assert os.listdir(tmp_path / "run") == []
    assert "run.dir=elsewhere" in answer(tmp_path, action, "run.dir=elsewhere", exit_code=2)


def test_a_checkpoint_is_shown_in_full(trained: Path) -> None:
    text = answer(trained, "show", "select.step=4")
    manifest = json.loads((path_of(trained, 4) / "manifest.json").read_text())
    assert text.startswith("step 4: run/checkpoints/step_00000004\n")
    assert "parameter tensors, 234k parameters (234,048)\n" in text
    for state in ("weight", "exp_avg", "exp_avg_sq"):
        assert re.search(rf"^ +{state} +914\.2 KiB$", text, re.MULTILINE), text  # 4 x 234,048 bytes
    data = manifest["details"]["data"]
    source = data["sources"]["text"]
    tokens = f"text {source['train']['num_tokens']:,} with the fingerprint {source['fingerprint']}\n"
    assert f"data        next sample 16; training tokens: {tokens}" in text
    assert "shards     1 file, 2.8 MiB\n" in text
    assert "layout      1 data x 1 tensor x 1 pipeline, ZeRO 1, fp32\n" in text
    assert all(f"{name} {version}" in text for name, version in manifest["details"]["versions"].items())
    assert "\n            train.global_batch_size=4\n" in text
    assert "against" not in text.splitlines()[-1]
    assert answer(trained, "show").startswith("step 8: ")


def test_two_checkpoints_are_compared(trained: Path) -> None:
    text = answer(trained, "show", "select.against=2").rpartition("\nagainst ")[2]
    assert text.startswith("run/checkpoints/step_00000002, step 2\n")
    assert "config      the same settings\n" in text
    assert "tensors     the same tensors, of the same shapes\n" in text


def test_another_folder_is_compared(trained: Path, tmp_path: Path) -> None:
    """Of a job with other settings and another shape of one tensor."""
    from distllm.checkpoint.manifest import Manifest, read_manifest, to_text

    other = tmp_path / "best"
    shutil.copytree(path_of(trained, 4), other)
    old = read_manifest(other)
    config = old.details["config"]
    details = old.details | {"config": config | {"train": config["train"] | {"seed": 7}}}
    tensors = old.tensors | {"embedding.word_embeddings.weight": (512, 64), "extra": (3,)}
    written = Manifest(**{**vars(old), "details": details, "tensors": tensors})
    (other / "manifest.json").write_text(to_text(written))
    text = answer(trained, "show", "select.step=8", f"select.against={other}").rpartition("\nagainst ")[2]
    assert text.startswith(f"{other}, step 4\n")
    assert "config      train.seed: 7 -> 1234\n" in text
    assert "embedding.word_embeddings.weight: (512, 64) -> (384, 64)\n" in text
    assert "extra: (3,) -> none\n" in text


def test_verification_reads_every_byte(folder: Path) -> None:
    text = answer(folder, "verify")
    assert re.fullmatch(r"(step_0000000\d: good, 2.8 MiB read in \S+\n){4}", text), text
    flip(path_of(folder, 4))
    (path_of(folder, 4) / "tokenizer" / "tokenizer.json").unlink()
    path_of(folder, 2).rename(path_of(folder, 2).with_suffix(".tmp"))
    text = answer(folder, "verify", exit_code=1)
    assert text.splitlines()[:4] == [
        "step_00000002.tmp: unfinished",
        "step_00000004: damaged",
        f"    {SHARD}: its content was altered",
        "    tokenizer/tokenizer.json: is missing",
    ]
    assert answer(folder, "verify", "select.step=6").startswith("step_00000006: good")
    answer(folder, "verify", "select.step=4", exit_code=1)


def test_pruning_keeps_what_the_run_keeps_unless_it_is_told_otherwise(folder: Path) -> None:
    text = answer(folder, "prune")
    assert "the newest 4 good checkpoints stay, for good those of every 4 steps\n" in text
    assert steps(folder) == [2, 4, 6, 8]
    text = answer(folder, "prune", "checkpoint.keep=1", "select.dry_run=true")
    assert text.startswith("dry run: nothing is removed\n")
    assert "would go    step_00000006  2.8 MiB\n            step_00000002  2.8 MiB\n" in text
    assert steps(folder) == [2, 4, 6, 8]
    files = [file for step in (2, 6) for file in path_of(folder, step).rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    text = answer(folder, "prune", "checkpoint.keep=1")
    assert steps(folder) == [4, 8]
    assert text.endswith(f"freed       5.7 MiB ({size:,} bytes)\n"), text
    answer(folder, "prune", "checkpoint.keep=1", "checkpoint.keep_every=0")
    assert steps(folder) == [8]


def test_pruning_never_takes_the_last_good_one(folder: Path) -> None:
    for step in (4, 6, 8):
        flip(path_of(folder, step))
    (folder / "run" / "checkpoints" / "step_00000009.tmp").mkdir()
    text = answer(folder, "prune", "checkpoint.keep=1", "checkpoint.keep_every=0")
    assert steps(folder) == [2, 4, 6, 8]
    assert "kept        step_00000002: good\n" in text
    assert f"step_00000008: not counted: {SHARD}: its content was altered\n" in text
    assert "removed     step_00000009.tmp  0 B\n" in text


def test_pruning_waits_for_no_running_job(folder: Path) -> None:
    lock = RunLock(folder / "run")
    begin = time.monotonic()
    text = answer(folder, "prune", "checkpoint.keep=1", "checkpoint.keep_every=0", exit_code=2)
    assert time.monotonic() - begin < 5
    assert "another job is running in it" in text
    assert str(os.getpid()) in text
    assert steps(folder) == [2, 4, 6, 8]
    assert answer(folder, "list").count("complete") == 4  # looking is free
    lock.release()


@pytest.mark.parametrize(
    ("arguments", "complaint", "fix"),
    [
        ((), "action=none\n    rule: must be one of list, show, verify, prune,", "distllm checkpoint list"),
        (("run.dir=run", "list"), "action=none", "distllm checkpoint list"),
        (("prun",), "action=prun\n    rule: must be one of list, show, verify, prune,", "checkpoint prune"),
        (("list", "select.step=4"), "select.step=4\n    rule: means nothing to list, only to show", "leave"),
        (("prune", "select.step=4"), "select.step=4\n    rule: means nothing to prune,", "leave it out"),
        (("verify", "select.against=4", "select.dry_run=true"), "2 problems", "leave it out"),
        (("show", "select.step=5"), "there are: 2, 4, 6, 8", "name one of them"),
        (("show", "select.against=5"), "there are: 2, 4, 6, 8", "name one of them"),
        (("show", "select.against=nowhere"), "FileNotFoundError", "select.step=N"),
        (("show", "select.against=[1]"), "select.against=[1]\n    rule: must be a valid string", "null"),
        (("list", "-m", "select.step=2,4"), "one run at a time", "for each of them"),
        (("list", "verify"), "override=verify", "quote"),
    ],
)
def test_mistakes_are_refused(arguments: tuple[str, ...], complaint: str, fix: str, trained: Path) -> None:
    result = fork(trained, "checkpoint", *arguments, *([] if "run.dir=run" in arguments else ["run.dir=run"]))
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert complaint in result.stderr
    assert fix in result.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("list", "--help"), ("show", "--cfg", "job")])
def test_help_needs_no_action(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = fork(tmp_path, "checkpoint", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\nselect:\n  step: null\n" in result.stdout


@pytest.mark.parametrize("action", ["list", "show", "verify", "prune"])
def test_an_answer_needs_nothing_heavy_and_no_second(action: str, folder: Path) -> None:
    arguments = ["checkpoint", action, "run.dir=run"]
    code = f"from distllm.__main__ import main; main({arguments!r})"
    assert_light(code, folder)

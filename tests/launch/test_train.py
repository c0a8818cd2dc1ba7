"""`distllm train` from end to end: what it leaves, how it goes on after any end, and what it refuses.

The job learns a corpus of some 50 kB on one sequence length; the runs of this file share its prepared data.
Steps are compared through metrics.jsonl, whose floats are exact.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, command, environment, fork, start

from distllm.__main__ import main

STEPS = 12
SEQUENCES = 5  # of validation, 2 at once: one rank pads them to 6, two ranks to 8
CONTRACT = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "tensorboard",
    "loss.png",
    "samples.txt",
    "status.json",
    "checkpoints",
    "events.jsonl",
    "ledger",
    ".lock",
}


class Workplace:
    """A folder with a corpus, where commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "corpus").mkdir(parents=True)
        words = ["def", "return", "if", "else", "for", "while", "import", "from", "class", "pass"]
        generator = random.Random(0)
        for number in range(60):
            text = " ".join(generator.choices(words, k=150)) + "\n"
            (folder / "corpus" / f"{number:02}.txt").write_text(text)

    def settings(self, run: str, *overrides: str) -> list[str]:
        return [
            "model=tiny",
            "tokenizer=bytes",
            "data=text",
            "data.path=corpus/*.txt",
            "data.cache=cache",
            "data.validation_fraction=0.1",
            f"train.steps={STEPS}",
            "train.global_batch_size=8",
            "train.micro_batch_size=2",
            "train.validation_interval=6",
            f"train.validation_sequences={SEQUENCES}",
            "optimizer.lr=0.003",
            "schedule=constant",
            "schedule.warmup_steps=2",
            "checkpoint.interval=4",
            "logging.sample_tokens=16",
            f"run.dir={run}",
            *overrides,
        ]

    def train(self, run: str, *overrides: str, **options: Any) -> Finished:
        return fork(self.folder, "train", *self.settings(run, *overrides), **options)

    def copy(self, run: str, name: str) -> Path:
        """A run that ends as `run` did."""
        return Path(shutil.copytree(self.folder / run, self.folder / name))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def single(workplace: Workplace) -> Finished:
    """The reference: one process, as a user starts it, never interrupted; leaves the run `single`."""
    result = start(workplace.folder, "train", *workplace.settings("single"))
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def double(workplace: Workplace, single: Finished) -> Finished:
    """The same job under torchrun on two ranks at ZeRO stage 3; leaves the run `double`."""
    result = start(workplace.folder, "train", *workplace.settings("double", "zero.stage=3"), num_ranks=2)
    assert result.exit_code == 0, result.output
    return result


def read_rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[tuple[float, ...]]:
    """(step, loss, gradient norm) of every training row, in the order of the file."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(run) if "loss" in row]


def validations(run: Path) -> list[tuple[float, ...]]:
    rows = [row for row in read_rows(run) if "validation_loss" in row]
    return [(row["step"], row["validation_loss"], row["validation_bits_per_byte"]) for row in rows]


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_as_uninterrupted(workplace: Workplace, run: str) -> None:
    """Each step once, and to the last bit what the run had that nothing interrupted."""
    path = workplace.folder / run
    assert curve(path) == curve(workplace.folder / "single")
    assert validations(path) == validations(workplace.folder / "single")
    assert status(path)["state"] == "completed"
    assert checkpoints(path)[-1] == f"step_{STEPS:08d}"


def test_a_run_leaves_all_of_the_contract(workplace: Workplace, single: Finished) -> None:
    run = workplace.folder / "single"
    assert {path.name for path in run.iterdir()} == CONTRACT
    assert checkpoints(run) == ["step_00000004", "step_00000008", "step_00000012"]
    assert "\n  hidden_size: 64\n" in (run / "config.yaml").read_text()
    described = json.loads((run / "environment.json").read_text())
    assert (described["world_size"], described["device"]) == (1, "cpu")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name[:19] for path in (run / "tensorboard").iterdir()] == ["events.out.tfevents"]
    assert (run / "samples.txt").read_text().startswith(f"=== step {STEPS} ===\ndef ")
    assert (status(run)["state"], status(run)["step"]) == ("completed", STEPS)
    kinds = [event["kind"] for event in events(run)]
    assert kinds == ["start", "ready", "checkpoint", "checkpoint", "checkpoint", "stop"]


def test_rows_have_what_the_contract_names(workplace: Workplace, single: Finished) -> None:
    rows = read_rows(workplace.folder / "single")
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    for row in training:
        assert row["consumed_samples"] == 8 * row["step"]
        assert row["consumed_tokens"] == 8 * 32 * row["step"]
        assert row["learning_rate"] == pytest.approx(0.0015 if row["step"] == 1 else 0.003)
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["step_seconds"])
    assert training[-1]["loss"] < training[0]["loss"] - 1.5
    assert [row["step"] for row in rows if "validation_loss" in row] == [6, 12]
    # The tokens are bytes, but for the end of a document, which is a label without bytes: a little more.
    for row in rows[-1:]:
        bits_per_token = row["validation_loss"] / 0.6931471805599453
        rounding = 1 - 1e-12  # of a sum and a quotient in fp64
        assert bits_per_token * rounding <= row["validation_bits_per_byte"] < 1.02 * bits_per_token


def test_the_user_sees_what_was_promised(single: Finished) -> None:
    """The model, its layout and its memory before; results, files and a sample after; plain lines between."""
    for promised in (
        "parameters",
        "replica 0  [0]",
        "activations",
        "training is complete",
        "bits per byte",
        "gzip -9",
        "single/loss.png",
        "| def ",
    ):
        assert promised in single.stdout, promised
    assert f"step {STEPS}/{STEPS}  loss " in single.stderr
    assert "step 12: checkpoint saved in" in single.stderr
    assert not any(noise in single.output for noise in ("Warning", "warn", "INFO", "DeepSpeed", "\r"))


def test_the_same_command_again_changes_nothing(workplace: Workplace, single: Finished) -> None:
    before = contents(workplace.folder)
    result = workplace.train("single")
    assert result.exit_code == 0
    assert f"single is complete: {STEPS} of {STEPS} steps are done." in result.stdout
    assert contents(workplace.folder) == before


def test_more_steps_go_on_where_the_run_ended(workplace: Workplace, single: Finished) -> None:
    assert workplace.train("longer", "train.steps=6").exit_code == 0
    assert checkpoints(workplace.folder / "longer") == ["step_00000004", "step_00000006"]
    assert workplace.train("longer").exit_code == 0
    assert_as_uninterrupted(workplace, "longer")
    starts = [event["step"] for event in events(workplace.folder / "longer") if event["kind"] == "start"]
    assert starts == [0, 6]


def test_a_resume_may_change_the_batch_and_the_rate(workplace: Workplace, single: Finished) -> None:
    """No sample is lost or repeated by another batch size; what has changed is told."""
    changes = ["train.steps=16", "train.global_batch_size=4", "optimizer.lr=0.001", "zero.stage=0"]
    run = workplace.copy("single", "changed")
    result = workplace.train("changed", *changes)
    assert result.exit_code == 0, result.output
    rows = [row for row in read_rows(run) if "loss" in row]
    assert [row["consumed_samples"] for row in rows] == [
        *range(8, 8 * STEPS + 1, 8),
        *range(8 * STEPS + 4, 8 * STEPS + 17, 4),
    ]
    assert [row["learning_rate"] for row in rows[-4:]] == [0.001] * 4
    (event,) = [event for event in events(run) if event["kind"] == "changed settings"]
    told = {name: change for name, change in event.items() if "." in name}
    assert told == {
        "optimizer.lr": "0.003 -> 0.001",
        "train.global_batch_size": "8 -> 4",
        "train.steps": "12 -> 16",
        "zero.stage": "1 -> 0",
    }
    assert "train.global_batch_size: 8 -> 4" in result.stdout


def die_after_six_steps() -> None:
    """kill -9 between two steps, the sixth being two behind the last checkpoint."""
    loop: Any = importlib.import_module("distllm.trainer.loop")
    take_step = loop.take_step

    def dying(job: Any, state: Any, allowed: Any) -> Any:
        if state.step == 6:
            job.checkpoints.finish()  # with the checkpoint of step 4 on disk, or the test hangs on the race
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(job, state, allowed)

    loop.take_step = dying


def die_in_the_second_save() -> None:
    """kill -9 when all tensors are written and the manifest is not."""
    store: Any = importlib.import_module("distllm.checkpoint.store")
    commit = store._commit

    def dying(temporary: Path, *rest: Any) -> None:
        if temporary.name == "step_00000008.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(temporary, *rest)

    store._commit = dying


@pytest.mark.parametrize("sabotage", [die_after_six_steps, die_in_the_second_save])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    sabotage: Any, workplace: Workplace, single: Finished
) -> None:
    name = sabotage.__name__
    run = workplace.folder / name
    assert workplace.train(name, sabotage=sabotage).exit_code == -signal.SIGKILL
    assert status(run)["state"] == "running", "a killed process has no last word"
    assert len(curve(run)) == 6 or (sabotage is die_in_the_second_save and 8 <= len(curve(run)) <= STEPS)
    left = ["step_00000004", "step_00000008.tmp"][: 1 + (sabotage is die_in_the_second_save)]
    assert checkpoints(run) == left
    assert workplace.train(name).exit_code == 0
    assert_as_uninterrupted(workplace, name)
    assert checkpoints(run) == ["step_00000004", "step_00000008", "step_00000012"]


def flip_a_bit(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("shards/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_loudly(workplace: Workplace, single: Finished) -> None:
    """The run resumes from the one before and replaces the damaged one when it comes to its step."""
    run = workplace.copy("single", "damaged")
    flip_a_bit(run / "checkpoints" / "step_00000012")
    complaint = "step_00000012: shards/rank_00000.distcp: its content was altered"
    assert complaint in fork(workplace.folder, "generate", "run.dir=damaged").stderr
    result = workplace.train("damaged")
    assert result.exit_code == 0, result.output
    assert f"WARNING: a damaged checkpoint was passed over: {complaint}" in result.stdout
    assert "continues after step 8 of 12" in result.stdout
    assert [e["reason"] for e in events(run) if e["kind"] == "damaged checkpoint"] == [complaint]
    assert_as_uninterrupted(workplace, "damaged")
    again = workplace.train("damaged")
    assert "is complete" in again.stdout
    assert "WARNING" not in again.output


def test_a_run_without_a_good_checkpoint_is_left_alone(workplace: Workplace, single: Finished) -> None:
    run = workplace.copy("single", "all_damaged")
    for name in checkpoints(run):
        flip_a_bit(run / "checkpoints" / name)
    before = contents(run)
    assert_refused(workplace.train("all_damaged"), "checkpoint", "none is good: step_00000012: shards")
    assert contents(run) == before


def test_two_ranks_train_as_one_does(workplace: Workplace, single: Finished, double: Finished) -> None:
    """1e-5 relative: sums of some 1e4 fp32 terms in another order, over 12 steps. Validation too, whose
    5 sequences are padded, and differently for one rank and for two."""
    one, two = workplace.folder / "single", workplace.folder / "double"
    for read in (curve, validations):
        for expected, found in zip(read(one), read(two), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    assert json.loads((two / "environment.json").read_text())["world_size"] == 2
    assert {path.name for path in two.iterdir()} == CONTRACT
    assert double.stdout.count("training is complete") == 1
    assert double.stderr.count(f"step {STEPS}/{STEPS}") == 1


def test_one_rank_goes_on_from_what_two_have_saved(
    workplace: Workplace, single: Finished, double: Finished
) -> None:
    """From ZeRO 3 on two ranks to ZeRO 0 on one, in the middle of the run."""
    run = workplace.copy("double", "moved")
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    result = workplace.train("moved", "zero.stage=0")
    assert result.exit_code == 0, result.output
    assert "continues after step 8" in result.stdout
    for expected, found in zip(curve(workplace.folder / "single"), curve(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_no_rank_leaves_folders_of_its_own(workplace: Workplace, single: Finished, double: Finished) -> None:
    """No outputs/ or multirun/ of Hydra, no cache of a library: only what the command line names."""
    named = {"corpus", "cache", "single", "double"}
    assert not {"outputs", "multirun", "distllm.log"} & set(os.listdir(workplace.folder))
    runs = {p.name for p in workplace.folder.iterdir() if (p / "status.json").exists() or p.name == "sweep"}
    assert {path.name for path in workplace.folder.iterdir()} <= named | runs


def generate(workplace: Workplace, *overrides: str) -> Finished:
    return fork(
        workplace.folder,
        "generate",
        *workplace.settings("double", "generate.prompt='if '", "generate.max_tokens=24", *overrides),
    )


def test_text_is_generated_from_a_checkpoint_of_other_ranks(workplace: Workplace, double: Finished) -> None:
    first = generate(workplace)
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("if ")
    assert len(first.stdout) > len("if ") + 10
    assert generate(workplace) == first, "the same seed, the same text"
    assert generate(workplace, "train.seed=5").stdout != first.stdout
    greedy = [generate(workplace, f"train.seed={n}", "generate.temperature=0") for n in (1, 2)]
    assert greedy[0] == greedy[1]
    # Twelve steps teach the letters of the corpus: bytes that are in it, mostly.
    assert sum(letter in "defrtunilsowhmpcax " for letter in first.stdout[3:]) >= 12


def test_the_checkpoint_says_what_the_model_is(workplace: Workplace, double: Finished) -> None:
    """`distllm generate run.dir=RUN` is enough: model and tokenizer come from the checkpoint."""
    plain = fork(
        workplace.folder,
        "generate",
        "run.dir=double",
        "generate.prompt='if '",
        "generate.max_tokens=24",
    )
    assert plain == generate(workplace)


def test_generate_needs_a_checkpoint(workplace: Workplace, single: Finished) -> None:
    result = fork(workplace.folder, "generate", "run.dir=nowhere")
    assert_refused(result, "run.dir=nowhere", "must hold a checkpoint")
    assert not (workplace.folder / "nowhere").exists()


def test_an_interrupted_run_says_so(workplace: Workplace, single: Finished) -> None:
    """Ctrl-C: exit code 130 without a traceback, and the run directory tells."""
    arguments = workplace.settings("interrupted", "train.steps=1000000", "checkpoint.interval=0")
    process = subprocess.Popen(
        command("train", *arguments),
        cwd=workplace.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        run = workplace.folder / "interrupted"
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(curve(run)) < 2:
            assert time.monotonic() < deadline, "no step within two minutes"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert status(run)["state"] == "failed"
    assert "KeyboardInterrupt" in status(run)["reason"]
    assert [event["kind"] for event in events(run)] == ["start", "ready", "stop"]


def test_data_and_tokenizer_are_prepared_once(workplace: Workplace) -> None:
    """What `distllm tokenizer` and `distllm data` have made, `train` takes from the cache."""
    bpe = ["tokenizer=bpe", "tokenizer.vocab_size=280", "data.cache=own_cache", "train.steps=2"]
    settings = workplace.settings("with_bpe", *bpe)
    tokenizer = fork(workplace.folder, "tokenizer", *settings)
    assert tokenizer.exit_code == 0, tokenizer.output
    file = Path(tokenizer.stdout.partition(": ")[0])
    assert file.name == "tokenizer.json"
    assert file.is_file()
    assert tokenizer.stdout.endswith(": 280 tokens\n")
    assert tokenizer.stderr.startswith("trained a tokenizer")

    data = fork(workplace.folder, "data", *settings)
    assert data.exit_code == 0, data.output
    assert "trained a tokenizer" not in data.stderr
    assert "tokenized 60 files" in data.stderr
    lines = data.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["text", "train"], ["text", "validation"]]
    assert [line.split()[0] for line in lines[2:]] == ["tokenizer"]
    assert Path(lines[0].rpartition(": ")[2]).is_file()

    before = contents(workplace.folder / "own_cache")
    trained = fork(workplace.folder, "train", *settings)
    assert trained.exit_code == 0, trained.output
    assert "tokenize" not in trained.stderr
    assert contents(workplace.folder / "own_cache") == before
    shutil.rmtree(workplace.folder / "own_cache")


def test_a_sweep_gives_every_job_its_folder(workplace: Workplace, single: Finished) -> None:
    settings = workplace.settings(
        "sweep", "train.steps=2", "checkpoint.interval=0", "logging.sample_tokens=0"
    )
    result = start(workplace.folder, "train", *settings, "-m", "train.seed=1,2")
    assert result.exit_code == 0, result.output
    sweep = workplace.folder / "sweep"
    assert sorted(os.listdir(sweep)) == ["multirun.yaml", "train.seed=1", "train.seed=2"]
    first, second = curve(sweep / "train.seed=1"), curve(sweep / "train.seed=2")
    assert len(first) == len(second) == 2
    assert first[0] != second[0]
    assert status(sweep / "train.seed=2")["state"] == "completed"


def assert_refused(result: Finished, setting: str, rule: str) -> None:
    """Exit code 2 and one message with one problem, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("problem") == 1, result.stderr
    heading, _, message = result.stderr.partition("distllm: 1 problem with this job:\n")
    assert "  1. " not in heading
    assert message.startswith(f"  1. {setting}"), result.stderr
    assert rule in message, result.stderr
    assert "\n    fix:  " in message
    assert "\n  2. " not in message


@pytest.mark.parametrize(
    ("overrides", "setting", "rule"),
    [
        (["data.path=absent/*.txt"], "data.path=absent/*.txt", "must match files"),
        (["data.path=empty.txt"], "data.path=empty.txt", "all 1 files are empty"),
        (["train.global_batch_size=7"], "train.global_batch_size=7", "must be a multiple of"),
        (["run.dir=file/run"], "run.dir=file/run", "file is not a folder"),
        (["model.seq_length=100000"], "model.seq_length=100000", "one sequence needs 100001 tokens"),
        (
            ["data.validation_fraction=0.00001"],
            "data.validation_fraction=1e-05",
            "must hold out a document",
        ),
    ],
)
def test_a_job_that_cannot_be_is_refused(
    overrides: list[str], setting: str, rule: str, workplace: Workplace, single: Finished, tmp_path: Path
) -> None:
    """Before anything is left of it."""
    shutil.copytree(workplace.folder / "corpus", tmp_path / "corpus")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "file").write_text("")
    result = fork(tmp_path, "train", *workplace.settings("run", *overrides))
    assert_refused(result, setting, rule)
    assert not (tmp_path / "run").exists()
    assert "training starts" not in result.stdout


@pytest.mark.parametrize(
    ("overrides", "setting", "rule"),
    [
        (["train.seed=5"], "train.seed=5", "step_00000012 was made with 1234"),
        (["model.seq_length=16"], "model.seq_length=16", "step_00000012 was made with 32"),
        (["tokenizer=bpe", "tokenizer.vocab_size=260"], "data=fingerprint", "must be those of step_00000012"),
        (["checkpoint.resume=never"], "checkpoint.resume=never", "single/checkpoints holds 3"),
        (["model.hidden_size=32"], "model.hidden_size=32", "step_00000012 was made with 64"),
        (["model.tie_embeddings=true"], "model.tie_embeddings=true", "made with false"),
    ],
)
def test_a_resume_that_cannot_be_is_refused(
    overrides: list[str], setting: str, rule: str, workplace: Workplace, single: Finished
) -> None:
    """And the run stays as it was, for the right command to go on with."""
    before = contents(workplace.folder / "single")
    assert_refused(workplace.train("single", *overrides), setting, rule)
    assert contents(workplace.folder / "single") == before


def test_changed_documents_are_refused_at_a_resume(
    workplace: Workplace, single: Finished, tmp_path: Path
) -> None:
    """One letter in one document, of the same length: other tokens under the same steps."""
    shutil.copytree(workplace.folder / "corpus", tmp_path / "corpus")
    shutil.copytree(workplace.folder / "single", tmp_path / "single")
    settings = workplace.settings("single", "train.steps=14")
    document = tmp_path / "corpus" / "07.txt"
    text = document.read_text()
    document.write_text(text.replace("w", "W", 1))
    assert_refused(fork(tmp_path, "train", *settings), "data=fingerprint", "restore the documents")
    document.write_text(text)
    assert fork(tmp_path, "train", *settings).exit_code == 0, "only the content counts, not the files' times"


def test_a_tokenizer_of_another_size_is_refused(workplace: Workplace, single: Finished) -> None:
    made = fork(workplace.folder, "tokenizer", *workplace.settings("none")).stdout
    folder = Path(made.partition(": ")[0]).parent
    overrides = ["tokenizer=bpe", f"tokenizer.path={folder}", "tokenizer.vocab_size=999"]
    result = workplace.train("other_tokenizer", *overrides)
    assert_refused(result, "tokenizer.vocab_size=999", "must be the size of the finished tokenizer, 257")
    assert not (workplace.folder / "other_tokenizer").exists()


@pytest.mark.parametrize(
    ("installed", "is_refused"), [("2.10.1", True), ("1.13.0+cu117", True), ("2.11.0", False)]
)
def test_an_old_torch_is_refused(
    installed: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: installed if name == "torch" else real(name)
    )
    code = main(
        ["train", "train.global_batch_size=7"]
    )  # which is refused in any case, before torch is imported
    message = capsys.readouterr().err
    assert code == 2
    assert (f"torch={installed}\n    rule: must be at least 2.11" in message) == is_refused
    assert ("2 problems" if is_refused else "1 problem ") in message

"""Exactly-once data: a mixture that changes twice, on 1, 2 and 4 data-parallel ranks, killed and resumed.

Each run is killed at random moments, goes on with another number of ranks, and must have trained on the very
tokens of one process that nothing interrupts, step by step; and its ledger must say so. What the ranks note
are hashes of the tokens that they were given; the ledger knows nothing of them.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_day import every_second
from commands import ForkedJob, fork
from runs import (
    SAMPLES,
    SMALL_RUN,
    curve,
    events,
    read_rows,
    record_samples,
    recorded_samples,
    status,
    write_corpus,
)

from distllm.lineage.history import blends, samples_of_step
from distllm.lineage.ledger import read_ledger
from distllm.lineage.origins import open_sources, trace, training_data
from distllm.metrics.run_directory import RunDirectory

STEPS = 24
SOURCES = (
    "data=mixture",
    "data.path=null",
    "data.sources.words.source=text",
    "data.sources.words.path=corpus/*.txt",
    "data.sources.words.weight=3",
    "data.sources.code.source=jsonl",
    "data.sources.code.path=code/*.jsonl",
    "data.changes=[{step: 7, weights: {words: 1, code: 1}}, {step: 15, weights: {words: 0.1, code: 0.9}}]",
)
RUN = (*SMALL_RUN, *SOURCES, "optimizer.lr=0.001", f"train.steps={STEPS}", "checkpoint.interval=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With both corpora, and the uninterrupted run: 192 samples, of which `code` has 33 in an epoch."""
    folder = tmp_path_factory.mktemp("once")
    write_corpus(folder, num_documents=5)
    (folder / "code").mkdir()
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4)}) for i in range(18)]
    (folder / "code" / "a.jsonl").write_text("\n".join(lines[:7]) + "\n")
    (folder / "code" / "b.jsonl").write_text("\n".join(lines[7:]) + "\n")
    with start(folder, "reference", 1, 0) as job:
        (end,) = job.wait()
    assert end.exit_code == 0, end.output
    return folder


def start(folder: Path, run: str, num_ranks: int, number: int, *overrides: str) -> ForkedJob:
    """number: of the start; each start's ranks note what they train on in a folder of its own."""
    samples = folder / run / f"samples_{number}"
    samples.mkdir(parents=True)
    return ForkedJob(
        folder,
        "train",
        *(*RUN, f"run.dir={run}", *overrides),
        num_ranks=num_ranks,
        sabotage=record_samples,
        environment={SAMPLES: str(samples)},
    )


def trained_on(run: Path) -> dict[int, list[str]]:
    """{step, from 0: hashes of the tokens of its sequences}; of a step done again, the last start's."""
    return recorded_samples(sorted(run.glob("samples_*"), key=lambda path: int(path.name[8:])))


def told_by_ledger(run: Path) -> dict[int, list[str]]:
    """The same, from the ledger alone."""
    ledger = read_ledger(RunDirectory(run, create=False))
    data = training_data(ledger, open_sources(ledger))
    found = {}
    for step in range(1, STEPS + 1):
        samples = data.read(samples_of_step(ledger.history, step), blends(ledger.history))
        found[step - 1] = sorted(hashlib.md5(tokens.tobytes()).hexdigest() for tokens in samples.tokens)
    return found


def kill_soon(job: ForkedJob, run: Path, generator: random.Random) -> None:
    done = len(read_rows(run))
    aim, deadline = done + generator.randrange(1, 7), time.monotonic() + 120
    while len(read_rows(run)) < aim and job.is_alive:
        assert time.monotonic() < deadline, f"no step {aim} within two minutes"
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.05))
    job.kill()


@pytest.mark.long
@pytest.mark.parametrize("seed", every_second([0, 1]))
def test_killed_on_any_number_of_ranks_the_data_is_the_same(folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    name, run = f"killed_{seed}", folder / f"killed_{seed}"
    for number in range(3):
        with start(folder, name, generator.choice([1, 2, 4]), number) as job:
            kill_soon(job, run, generator)
    with start(folder, name, [2, 4][seed], 3) as job:
        for end in job.wait():
            assert end.exit_code == 0, end.output
    assert status(run)["state"] == "completed"
    expected = trained_on(folder / "reference")
    assert sorted(expected) == list(range(STEPS))
    assert trained_on(run) == expected
    assert told_by_ledger(run) == told_by_ledger(folder / "reference") == expected
    # Other numbers of ranks add up in another order: as in test_kill_and_relayout.py.
    for found, wanted in zip(curve(run), curve(folder / "reference"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    proof = fork(folder, "lineage", f"run.dir={name}", "verify=true")
    assert proof.exit_code == 0, proof.output
    assert "exactly once" in proof.stdout
    assert f"1 to {STEPS}, 192 sequences" in proof.stdout


def test_the_sources_come_in_their_proportions(folder: Path) -> None:
    rows = read_rows(folder / "reference")
    shares = {"words": [0.75 * 56, 0.5 * 64, 0.1 * 72], "code": [0.25 * 56, 0.5 * 64, 0.9 * 72]}
    for name, parts in shares.items():
        tokens = [rows[step - 1][f"consumed_tokens/{name}"] / 32 for step in (7, 15, 24)]
        assert tokens == pytest.approx([sum(parts[:1]), sum(parts[:2]), sum(parts)], abs=3)


def test_a_step_leads_back_to_its_documents(folder: Path) -> None:
    result = fork(folder, "lineage", "run.dir=reference", "step=20")
    assert result.exit_code == 0, result.output
    former = fork(folder, "trace", "run.dir=reference", "step=20")
    assert (former.exit_code, former.stdout) == (0, result.stdout)
    assert former.stderr == "distllm trace is now called distllm lineage\n"
    title, header, *lines = result.stdout.splitlines()
    assert title.startswith("step 20: samples 152 to 159, 8 sequences of 32 tokens")
    assert header.split() == ["sample", "source", "epoch", "sequence", "document", "tokens", "file", "row"]
    first_words = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert first_words == [str(sample) for sample in range(152, 160)]
    ledger = read_ledger(RunDirectory(folder / "reference", create=False))
    sources = open_sources(ledger)
    for sample in trace(ledger, 20):
        text = "".join(map(read_origin, sample.origins))
        tokens = sources[sample.source].sequences.read(np.array([sample.sequence])).tokens[0].tolist()
        # Bytes are tokens here, and 256 ends a document.
        assert text.encode() == bytes(token for token in tokens if token < 256)


def read_origin(origin: Any) -> str:
    """The text that an origin names, from the user's own file. One byte is one token in this run."""
    if origin.file.endswith(".txt"):
        document = Path(origin.file).read_text()
    else:
        document = json.loads(Path(origin.file).read_text().splitlines()[origin.row])["text"]
    assert origin.num_tokens == len(document) + 1, "and one for the end of the document"
    return str(document[origin.start : origin.stop])


def test_another_mixture_at_a_resume(folder: Path) -> None:
    """Weights from the command line, a new source and one that goes: nothing is lost or comes twice."""
    (folder / "more").mkdir()
    (folder / "more" / "new.txt").write_text("brand new text " * 80)
    with start(folder, "changed", 2, 0, "train.steps=9") as job:
        for end in job.wait():
            assert end.exit_code == 0, end.output
    added = ("data.sources.new.source=text", "data.sources.new.path=more/*.txt", "data.changes=[]")
    weights = ("data.sources.words.weight=0", "data.sources.code.weight=1", "data.sources.new.weight=1")
    with start(folder, "changed", 1, 1, *added, *weights) as job:
        (end,) = job.wait()
    assert end.exit_code == 0, end.output
    assert "data.sources" in end.stdout, "the change is told"
    rows = read_rows(folder / "changed")
    assert rows[-1]["consumed_tokens/words"] == rows[8]["consumed_tokens/words"]
    new = [row.get("consumed_tokens/new", 0) / 32 for row in rows]
    assert new[:9] == [0] * 9
    assert new[-1] == pytest.approx(15 * 8 / 2, abs=3)
    assert told_by_ledger(folder / "changed") == trained_on(folder / "changed")
    proof = fork(folder, "lineage", "run.dir=changed", "verify=true")
    assert proof.exit_code == 0, proof.output
    (change,) = events(folder / "changed", "changed settings")
    assert "data.sources" in change


@pytest.mark.long
def test_a_resume_at_every_step(folder: Path) -> None:
    """Each checkpoint leads to the run's end, over both changes of the mixture and an epoch's end."""
    every = ("checkpoint.interval=1", "checkpoint.keep=100", "logging.interval=100")
    with start(folder, "every_step", 1, 0, *every) as job:
        (end,) = job.wait()
    assert end.exit_code == 0, end.output
    expected = trained_on(folder / "every_step")
    assert expected == trained_on(folder / "reference")
    for step in range(1, STEPS, 3):
        path = folder / "every_step" / "checkpoints" / f"step_{step:08}"
        with start(folder, f"from_{step}", 1, 0, f"checkpoint.resume={path}") as job:
            (end,) = job.wait()
        assert end.exit_code == 0, end.output
        found = trained_on(folder / f"from_{step}")
        assert found == {number: hashes for number, hashes in expected.items() if number >= step}
        assert curve(folder / f"from_{step}") == curve(folder / "every_step")[step:]
    proof = fork(folder, "lineage", f"run.dir=from_{step}", "verify=true")
    assert proof.exit_code == 0, proof.output


def test_an_epoch_limit_is_kept_before_the_first_step(folder: Path) -> None:
    job = fork(folder, "train", *RUN, "run.dir=limited", "data.sources.code.max_epochs=2")
    assert job.exit_code == 2
    assert "data.sources.code.max_epochs=2" in job.stderr
    assert "would be seen more often by the last step" in job.stderr
    assert not (folder / "limited").exists()


def test_a_changed_source_is_refused_with_what_changed(folder: Path) -> None:
    (folder / "code" / "a.jsonl").open("a").write('{"text": "one more"}\n')
    try:
        job = fork(folder, "train", *RUN, "run.dir=reference", f"train.steps={STEPS + 1}")
    finally:
        lines = (folder / "code" / "a.jsonl").read_text().splitlines(keepends=True)
        (folder / "code" / "a.jsonl").write_text("".join(lines[:-1]))
    assert job.exit_code == 2
    assert "data.sources.code=fingerprint" in job.stderr
    assert "a.jsonl had" in job.stderr
    again = fork(folder, "train", *RUN, "run.dir=reference", f"train.steps={STEPS}")
    assert again.exit_code == 0, "the same text is the same data, whenever it was written"


PACKED = ("sequences=best_fit", "train.steps=8", "data.changes=[]", "data.validation_fraction=0.5")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("parallel.tensor=2", "zero.stage=2"),
        pytest.param(("parallel.pipeline=2",), marks=pytest.mark.nightly),
    ],
)
def test_packed_documents_train_alike_under_every_layout(folder: Path, overrides: tuple[str, ...]) -> None:
    """Padding and boundaries weigh unevenly on ranks and microbatches; the mean is the global one."""
    if not (folder / "packed").exists():
        with start(folder, "packed", 1, 0, *PACKED, "train.validation_interval=4") as job:
            (end,) = job.wait()
        assert end.exit_code == 0, end.output
        assert "packed" in end.stderr, "the packing is told of"
    name = f"packed_{len(overrides)}"
    with start(folder, name, 2, 0, *PACKED, "train.validation_interval=4", *overrides) as job:
        for end in job.wait():
            assert end.exit_code == 0, end.output
    assert trained_on(folder / name) == trained_on(folder / "packed")
    for found, wanted in zip(read_rows(folder / name), read_rows(folder / "packed"), strict=True):
        for key in (k for k in found if not k.endswith("_seconds") and k != "tokens_per_second"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), key
    proof = fork(folder, "lineage", f"run.dir={name}", "verify=true")
    assert proof.exit_code == 0, proof.output

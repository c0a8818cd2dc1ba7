"""Small runs of `distllm train` on a made-up corpus, and what is read from their folders."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from commands import ForkedJob

SAMPLES = "DISTLLM_TEST_SAMPLES"  # environment variable: folder where `record_samples` writes

SMALL_RUN = (
    "model=tiny",
    "tokenizer=bytes",
    "data=text",
    "data.path=corpus/*.txt",
    "data.cache=cache",
    "data.validation_fraction=0",
    "train.validation_interval=0",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "optimizer.lr=0.003",
    # Above the rounding noise of gradients, which Adam would otherwise blow up (see jobs.py).
    "optimizer.epsilon=1e-6",
    "schedule=constant",
    "schedule.warmup_steps=2",
    "logging.sample_tokens=0",
    "logging.tensorboard=false",
)


def write_corpus(folder: Path, num_documents: int = 60, words_per_document: int = 150) -> None:
    words = ["def", "return", "if", "else", "for", "while", "import", "from", "class", "pass"]
    generator = random.Random(0)
    (folder / "corpus").mkdir(parents=True)
    for number in range(num_documents):
        text = " ".join(generator.choices(words, k=words_per_document)) + "\n"
        (folder / "corpus" / f"{number:02}.txt").write_text(text)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl; a last line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(run: Path) -> list[tuple[float, ...]]:
    """(step, loss, gradient norm, samples so far) of every training row, in the order of the file."""
    return [
        (row["step"], row["loss"], row["grad_norm"], row["consumed_samples"])
        for row in read_rows(run)
        if "loss" in row
    ]


def wait_for_steps(job: ForkedJob, run: Path, count: int) -> None:
    """Until metrics.jsonl has as many rows; an assertion if the job ends first."""
    deadline = time.monotonic() + 60
    while len(read_rows(run)) < count:
        assert time.monotonic() < deadline, f"no step {count} within a minute"
        assert job.is_alive, [end.output for end in job.wait()]
        time.sleep(0.01)


def status(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "status.json").read_text()))


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if kind in (None, event["kind"])]


def record_samples() -> None:
    """Sabotage that breaks nothing: each data-parallel rank notes which sequences it trains on in which step,
    as {step: hashes}, in the folder that the environment names."""
    import hashlib
    import importlib

    loop: Any = importlib.import_module("distllm.trainer.loop")
    take_step = loop.take_step

    def recording(job: Any, state: Any, allowed: Any) -> Any:
        microbatches = job.batches.microbatches(state)
        here = job.groups.coordinates
        if here.tensor == 0 and here.pipeline == 0:
            hashes = [
                hashlib.md5(sequence.numpy().tobytes()).hexdigest()
                for microbatch in microbatches
                for sequence in microbatch.tokens.cpu()
            ]
            file = Path(os.environ[SAMPLES], f"{here.data}.jsonl")
            with open(file, "a") as stream:
                stream.write(json.dumps([state.step, hashes]) + "\n")
        return take_step(job, state, allowed)

    loop.take_step = recording


def recorded_samples(folders: list[Path]) -> dict[int, list[str]]:
    """{step: sorted hashes} over all ranks; of a step that was done again, the last start's."""
    samples: dict[int, list[str]] = {}
    for folder in folders:
        of_start: dict[int, list[str]] = {}
        for file in folder.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                step, hashes = json.loads(line)
                of_start.setdefault(step, []).extend(hashes)
        samples |= {step: sorted(hashes) for step, hashes in of_start.items()}
    return samples

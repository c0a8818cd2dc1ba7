"""`distllm bench`: every action says what it measured, in a table and in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import fork, start

pytestmark = pytest.mark.alone  # it measures speed

SMALL = (
    "model=tiny",
    "model.num_layers=2",
    "tokenizer=bytes",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "bench.steps=3",
    "bench.warmup_steps=1",
    "bench.repeats=2",
    "bench.json=results/out.json",
)


def bench(folder: Path, action: str, *overrides: str) -> tuple[str, dict[str, Any]]:
    """The table and the JSON; nothing else may be left behind."""
    (folder / "scratch").mkdir()
    done = fork(folder, "bench", action, *SMALL, "bench.folder=scratch", *overrides)
    assert done.exit_code == 0, done.output
    assert not list((folder / "scratch").iterdir())
    return done.stdout, read(folder)


def read(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "results" / "out.json").read_text())
    assert {"bench", "date", "environment", "device", "config", "results"} <= report.keys()
    assert report["environment"]["versions"]["torch"]
    results: dict[str, Any] = report["results"]
    return results


@pytest.mark.long
def test_recomputing_saves_memory(tmp_path: Path) -> None:
    """Long sequences, so that activations are most of the memory: 4 layers of 512 tokens hold some 20 MB."""
    shape = ("model.num_layers=4", "model.seq_length=512", "train.micro_batch_size=4")
    table, results = bench(tmp_path, "recompute", *shape)
    rows = {(row["recompute"]["granularity"], row["recompute"]["num_layers"]): row for row in results["rows"]}
    assert list(rows) == [("none", None), ("selective", None), *(("full", n) for n in (1, 2, 3, None))]
    assert all(row["step_seconds"]["count"] == 3 * 2 for row in rows.values())
    memory = {key: row["peak_memory_bytes"] for key, row in rows.items()}
    assert memory["full", None] < memory["full", 2] < memory["none", None]
    assert [line.split("  ")[0] for line in table.splitlines()[3:]] == [
        *("none", "selective", "1 layer", "2 layers", "3 layers", "all layers")
    ]
    assert "ms for a GiB" in table


def test_train_tells_the_speed_of_steps(tmp_path: Path) -> None:
    table, results = bench(tmp_path, "train")
    seconds = results["step_seconds"]
    assert seconds["count"] == 3
    assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    assert results["tokens_per_step"] == 4 * 32
    assert results["tokens_per_second"] == pytest.approx(4 * 32 / seconds["median"])
    products = results["flops_per_token"] * results["tokens_per_second"] / results["measured_peak_flops"]
    assert results["share_of_measured_peak"] == pytest.approx(products)
    assert 0 < products < 1
    assert set(results["phases"]) == {"forward", "backward", "optimizer"}
    assert all(0 < phase < seconds["most"] for phase in results["phases"].values())
    assert results["mfu"] is None  # no peak of a processor is known
    # Weights, gradients and two moments in fp32 are the least that must have been added.
    assert results["peak_memory_bytes"] > 16 * results["num_parameters"]
    assert results["end_loss"] < results["start_loss"]  # steps that do not learn are no steps
    assert f"tiny: {results['num_parameters'] / 1e3:.4g}k parameters" in table
    assert f"{seconds['median']:.4g} s, median of 3" in table
    assert "OVERFLOW" not in table


@pytest.mark.long
def test_train_measures_all_ranks(tmp_path: Path) -> None:
    done = start(tmp_path, "bench", "train", *SMALL, "train.precision=bf16", "parallel.tensor=2", num_ranks=2)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("distllm bench train: 2 ranks") == 1
    assert read(tmp_path)["tokens_per_step"] == 4 * 32


def test_checkpoint_tells_of_saves_and_loads(tmp_path: Path) -> None:
    table, results = bench(tmp_path, "checkpoint")
    rows = {row["what"]: row for row in results["rows"]}
    assert set(rows) == {
        "save at once",
        "first save in the background",
        "every other",
        "load",
        "verify and load",
    }
    for what, row in rows.items():
        assert 0 < row["blocking_seconds"]["median"] <= row["seconds"]["median"]
        assert what in table
        # Only what goes on in the background leaves the main thread anything to do.
        assert (row["speed"] is not None) == (what in ("first save in the background", "every other"))
    assert results["bytes"] > 3 * 4 * 140_000  # weights and two moments of that many parameters


def test_data_tells_the_rates_of_preparing_and_reading(tmp_path: Path) -> None:
    text = "a sentence that is no news to anybody\n" * 400
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(text)
    without_validation = ("data.validation_fraction=0", "train.validation_interval=0")
    table, results = bench(tmp_path, "data", "data=text", f"data.path={tmp_path}/*.txt", *without_validation)
    assert results["num_bytes"] == 10 * len(text)
    assert results["num_tokens"] == 10 * (len(text) + 1)  # one token a byte, one for the end of a document
    assert results["tokens_per_second"]["count"] == 2
    assert results["tokens_per_second"]["least"] > 0
    assert f"{results['num_tokens']:,} tokens" in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trian",), "fix:  distllm bench train"),
        (("train", "bench.folder=nowhere"), "bench.folder=nowhere"),
        (("train", "bench.steps=0"), "bench.steps=0"),
        (("data", "data=text", "data.path=nowhere/*.txt"), "nowhere"),
    ],
)
def test_mistakes_are_refused(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    action, *overrides = arguments
    done = fork(tmp_path, "bench", action, *(text for text in SMALL if "steps" not in text), *overrides)
    assert done.exit_code == 2, done.output
    assert said in done.stderr

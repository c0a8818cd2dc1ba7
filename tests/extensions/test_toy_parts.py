"""A part that is registered from elsewhere trains, is planned for, saved and resumed like distllm's own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import jobs
import pytest
from commands import ROOT, ForkedJob
from harness import run_ranks
from runs import SMALL_RUN, curve, write_corpus

from distllm.bench.local_ranks import run_on_ranks
from distllm.checkpoint.manifest import read_manifest
from distllm.layout.traffic import Traffic
from distllm.plan.communication import rank_traffic
from distllm.plan.rank_view import RankView
from distllm.runtime.collective_counter import CollectiveCounter

HERE = str(Path(__file__).parent)
PLUGIN = {"DISTLLM_PLUGINS": "toy_parts"}
FAMILY = ("model.family=toy",)
OPTIMIZER = ("optimizer.kind=toy",)
OBJECTIVE = ("objective.kind=toy",)
LAYOUTS: list[tuple[str, ...]] = [
    ("parallel.tensor=2", "parallel.sequence=true", "zero.stage=0"),
    ("parallel.pipeline=2", "model.tie_embeddings=true", "zero.stage=3"),
    ("parallel.pipeline=2", "model.tie_embeddings=true", "zero.stage=1"),
    ("zero.stage=2",),
    ("zero.stage=3", "model.tie_embeddings=true"),
]


def register() -> None:
    """In a process that runs no command line: what DISTLLM_PLUGINS does."""
    import sys

    sys.path.insert(0, HERE)
    import toy_parts  # noqa: F401


def train_toys(rank: int, cases: list[tuple[str, ...]]) -> list[jobs.Trace]:
    register()
    return jobs.train_cases(rank, cases, steps=4)


@pytest.mark.parametrize("part", [FAMILY, OPTIMIZER, OBJECTIVE], ids=["family", "optimizer", "objective"])
def test_every_layout_trains_as_one_process(part: tuple[str, ...]) -> None:
    """Losses, norms, first gradients and last weights; tolerances as for distllm's own (jobs.py)."""
    cases = [(*part, *layout) for layout in LAYOUTS]
    tied = {case: "model.tie_embeddings=true" in case for case in cases}
    alone = [(*part, "model.tie_embeddings=true"), part]
    expected_tied, expected = run_ranks(1, train_toys, alone)[0]
    for case, trace in zip(cases, run_ranks(2, train_toys, cases)[0], strict=True):
        jobs.assert_traces_equal(trace, expected_tied if tied[case] else expected, " ".join(case))


def known_families(rank: int) -> list[str]:
    from distllm.config.registry import FAMILIES

    return list(FAMILIES)


def test_ranks_that_bench_starts_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLLM_PLUGINS", PLUGIN["DISTLLM_PLUGINS"])
    (known,) = run_on_ranks(1, known_families, starts_world=False)
    assert "toy" in known


def test_the_parts_are_not_those_of_distllm() -> None:
    """Else the tests here would show nothing: each changes what is trained."""
    losses = [trace.losses for trace in run_ranks(1, train_toys, [(), FAMILY, OPTIMIZER, OBJECTIVE])[0]]
    assert len({tuple(found) for found in losses}) == 4
    assert losses[0][0] == losses[2][0], "the optimizer is at work after the first step"


def count_traffic(rank: int, cases: list[tuple[str, ...]]) -> list[tuple[Traffic, Traffic]]:
    register()
    found: list[tuple[Traffic, Traffic]] = []
    for case in cases:
        config = jobs.make_config(*FAMILY, *case)
        engine = jobs.build_engine(config)
        for step in range(2):
            batch = jobs.microbatches(step, config, engine.groups)
            with CollectiveCounter(engine.groups) as counter:
                engine.train_step(batch, config.optimizer.lr)
        place = engine.groups.coordinates.pipeline
        predicted = rank_traffic(RankView(config, jobs.VOCAB_SIZE, engine.groups.grid, place), False)
        found.append((counter.traffic(), predicted))
        jobs.finish(engine)
    return found


def test_what_a_family_sends_is_predicted_from_its_table() -> None:
    for result in run_ranks(2, count_traffic, [layout for layout in LAYOUTS if "zero.stage=3" not in layout]):
        for counted, predicted in result:
            assert counted == predicted


def test_gathered_bytes_of_a_family_are_predicted() -> None:
    """Of stage 3 the calls are bounded only."""
    for result in run_ranks(2, count_traffic, [layout for layout in LAYOUTS if "zero.stage=3" in layout]):
        for counted, predicted in result:
            assert {t: a.bytes for t, a in counted.items()} == {t: a.bytes for t, a in predicted.items()}


def job(folder: Path, *arguments: str, num_ranks: int = 1) -> str:
    with ForkedJob(folder, *arguments, num_ranks=num_ranks, sabotage=register, environment=PLUGIN) as started:
        ended = started.wait()
        assert [end.exit_code for end in ended] == [0] * num_ranks, ended[0].output
        return ended[0].stdout


def test_the_whole_life_of_a_toy(tmp_path: Path) -> None:
    """check, train, another layout from the checkpoint, generate: with all three parts at once."""
    write_corpus(tmp_path)
    toy = (*SMALL_RUN, *FAMILY, *OPTIMIZER, *OBJECTIVE, "checkpoint.interval=3", "optimizer.lr=0.02")
    told = job(tmp_path, "check", *toy, "world_size=2", "zero.stage=2")
    assert "optimizer states" in told
    job(tmp_path, "train", *toy, "run.dir=whole", "train.steps=6")
    job(tmp_path, "train", *toy, "run.dir=parts", "train.steps=3")
    job(tmp_path, "train", *toy, "run.dir=parts", "train.steps=6", "zero.stage=2", num_ranks=2)
    for ours, expected in zip(curve(tmp_path / "parts"), curve(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    manifest = read_manifest(tmp_path / "parts" / "checkpoints" / "step_00000006")
    assert list(manifest.states) == ["momentum_buffer"]
    assert manifest.tensors["decoder.layers.3.mlp.scale"] == (64,)
    assert job(tmp_path, "generate", "run.dir=parts", "generate.prompt=def").startswith("def")


def test_rules_of_a_family_are_those_of_its_jobs(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    toy = (*SMALL_RUN, *FAMILY, "model.position_embedding=learned")
    with ForkedJob(tmp_path, "train", *toy, sabotage=register, environment=PLUGIN) as started:
        (end,) = started.wait()
    assert (end.exit_code, "must be rope in the family toy" in end.stderr) == (2, True)


def test_a_name_that_nobody_has_registered_is_refused(tmp_path: Path) -> None:
    names: dict[str, Any] = {"model.family": "llama", "optimizer.kind": "adamw", "objective.kind": "pretrain"}
    wrong = [f"{setting}={name[:-1]}" for setting, name in names.items()]
    with ForkedJob(tmp_path, "train", *wrong) as started:
        (end,) = started.wait()
    assert end.exit_code == 2
    assert all(f"fix:  {setting}={name}" in end.stderr for setting, name in names.items())


def test_no_file_of_distllm_mentions_a_toy() -> None:
    found = subprocess.run(
        ["grep", "-rliw", "toy", str(ROOT / "distllm"), str(ROOT / "conf")], capture_output=True, text=True
    )
    assert found.stdout == ""

"""Steps that must not happen do not, on all ranks alike; the run goes on without what did it."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Finished, ForkedJob
from runs import SAMPLES, SMALL_RUN, curve, events, record_samples, recorded_samples, status, write_corpus

STEPS = 20
RUN = (
    *SMALL_RUN,
    "optimizer.lr=0.001",
    f"train.steps={STEPS}",
    "checkpoint.interval=4",
    "fault.spike_action=skip",
    "fault.spike_window=8",
    # The small tied model has steps of its own with ten times the usual gradient; what is injected has 10^4.
    "fault.spike_threshold=1000.0",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ("zero.stage=0",)),
    "dp2 z0": (2, ("zero.stage=0",)),
    "dp2 z2": (2, ("zero.stage=2",)),
    "dp2 z3": (2, ("zero.stage=3",)),
    "pp2 z1": (2, ("parallel.pipeline=2", "zero.stage=1", "model.tie_embeddings=true")),
    "tp2 z1 bf16": (2, ("parallel.tensor=2", "zero.stage=1", "train.precision=bf16")),
}


def train(folder: Path, run: str, layout: str, *overrides: str) -> list[Finished]:
    num_ranks, settings = LAYOUTS[layout]
    (folder / run / "samples").mkdir(parents=True)
    arguments = (*RUN, *settings, f"run.dir={run}", *overrides)
    with ForkedJob(
        folder,
        "train",
        *arguments,
        num_ranks=num_ranks,
        sabotage=record_samples,
        environment={SAMPLES: str(folder / run / "samples")},
    ) as job:
        return job.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    write_corpus(folder)
    return folder


@pytest.fixture(
    params=[
        "dp2 z2",
        pytest.param("pp2 z1", marks=pytest.mark.long),
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in LAYOUTS
            if name not in ("dp2 z2", "pp2 z1")
        ),
    ]
)
def layout(request: pytest.FixtureRequest, folder: Path) -> str:
    """Each layout, whose uninterrupted run lies in `whole LAYOUT`."""
    name: str = request.param
    if not (folder / f"whole {name}").exists():
        assert_done(train(folder, f"whole {name}", name))
    return name


def assert_done(ends: list[Finished]) -> None:
    for end in ends:
        assert end.exit_code == 0, end.output


@pytest.mark.parametrize("step", [0, 13])
def test_a_fault_that_does_not_come_back_leaves_no_trace(layout: str, step: int, folder: Path) -> None:
    """NaN in the gradients of one rank, once: the step is done again from the same samples, to the bit."""
    rank = LAYOUTS[layout][0] - 1
    run = f"nan {layout} {step}"
    assert_done(train(folder, run, layout, f"fault.inject=['nan:step={step},rank={rank}']"))
    assert curve(folder / run) == curve(folder / f"whole {layout}")
    (event,) = events(folder / run, "step refused")
    assert (event["action"], event["step"]) == ("retry", step)
    assert "not finite" in event["reason"]
    (first,) = event["first_non_finite"]
    assert first["rank"] == rank
    # The gradients come from the last layer to the first; the last stage's is the loss's side.
    assert first["what"] == ("embedding.word_embeddings.weight" if "pp2" in layout else "output_layer.weight")
    assert event["loss"] is not None


def test_samples_that_overflow_are_skipped(layout: str, folder: Path) -> None:
    """NaN whenever sample 42 is trained on: after one retry the step's samples are left out, all others come
    in their order, and the run still does all its steps."""
    run = f"overflow {layout}"
    assert_done(train(folder, run, layout, "fault.inject=['nan:sample=42,rank=0,times=0']"))
    refused = events(folder / run, "step refused")
    assert [event["action"] for event in refused] == ["retry", "skip"]
    assert all(event["samples"] == [40, 48] for event in refused)
    rows = curve(folder / run)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert [row[3] for row in rows] == list(range(8, 8 * STEPS + 1, 8)), "skipped samples are not consumed"
    whole = recorded_samples([folder / f"whole {layout}" / "samples"])
    found = recorded_samples([folder / run / "samples"])
    assert [found[step] for step in range(5)] == [whole[step] for step in range(5)]
    assert [found[step][-8:] for step in range(6, STEPS - 1)] == [
        whole[step + 1] for step in range(6, STEPS - 1)
    ]


@pytest.mark.long
@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_a_spike_is_kept_out(layout: str, action: str, folder: Path) -> None:
    """Gradients of one rank 10,000 times too large whenever sample 108 is trained on (step 13). With a rewind
    the run goes back to the checkpoint of step 12 first and passes the samples by when it comes to them: as
    nothing of the spike reached the weights, both ways train on the same samples and give the same curve."""
    path, inject = folder / f"spike {action} {layout}", "fault.inject=['spike:sample=108,rank=0,times=0']"
    assert_done(train(folder, path.name, layout, f"fault.spike_action={action}", inject))
    (refused,) = events(path, "step refused")
    assert (refused["action"], refused["step"], refused["samples"]) == (action, 13, [104, 112])
    assert refused["reason"].startswith("spike: gradient norm ")
    rows = curve(path)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert [row[3] for row in rows] == list(range(8, 8 * STEPS + 1, 8))
    assert rows[:13] == curve(folder / f"whole {layout}")[:13]
    assert max(row[1] for row in rows[13:]) < rows[8][1], "the curve is clean"
    rewinds = events(path, "rewind")
    assert len(rewinds) == (action == "rewind")
    if action == "rewind":
        assert (rewinds[0]["step"], rewinds[0]["lost_steps"]) == (12, 1)
        assert rewinds[0]["skipped_samples"] == [104, 112]
        assert_done(train(folder, f"skip {layout}", layout, inject))
        assert rows == curve(folder / f"skip {layout}")


def test_the_bound_survives_a_restart(folder: Path) -> None:
    """The window of the guard is in the checkpoint: a spike in the first step after a resume is seen."""
    assert_done(train(folder, "first half", "1", "train.steps=12"))
    with ForkedJob(
        folder,
        "train",
        *RUN,
        "zero.stage=0",
        "run.dir=first half",
        "fault.inject=['spike:step=12,times=0,sample=96']",
    ) as job:
        assert_done(job.wait())
    (refused,) = events(folder / "first half", "step refused")
    assert (refused["action"], refused["step"]) == ("skip", 12)


def test_a_job_that_only_diverges_gives_up(folder: Path) -> None:
    ends = train(
        folder, "diverged", "dp2 z2", "fault.inject=['nan:rank=1,times=0']", "fault.max_refused_steps=5"
    )
    assert {end.exit_code for end in ends} == {1}
    refused = events(folder / "diverged", "step refused")
    assert [event["action"] for event in refused] == ["retry", "skip", "retry", "skip", "give up"]
    assert status(folder / "diverged")["state"] == "failed"
    assert "5 steps in a row were refused" in status(folder / "diverged")["reason"]


def test_rewinds_are_bounded(folder: Path) -> None:
    """The same spike at the same step whatever the samples: no end of rewinds."""
    inject = "fault.inject=['spike:step=13,times=0']"
    ends = train(folder, "bounded", "1", inject, "fault.spike_action=rewind", "fault.max_rewinds=2")
    assert {end.exit_code for end in ends} == {1}
    assert len(events(folder / "bounded", "rewind")) == 2
    assert "there were 2 rewinds already" in status(folder / "bounded")["reason"]

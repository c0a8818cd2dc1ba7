"""SIGKILL under layout A, resume under layout B: metrics and samples as if nothing had happened.

Every pair kills all ranks at a random moment of the run and goes on with what is then on disk; the reference
is one process that nothing interrupts. 1e-5 relative: other layouts add up some 1e4 fp32 terms in another
order, over 20 steps (see jobs.assert_traces_equal).
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from commands import ForkedJob
from runs import SAMPLES, SMALL_RUN, curve, read_rows, record_samples, recorded_samples, status, write_corpus

STEPS = 20
# At 0.003, SMALL_RUN's rate, a tied run takes a step with a gradient of norm 165, after which uninterrupted
# runs of two layouts differ by 1e-4 too; at 0.001 they stay within 4e-6.
RUN = (*SMALL_RUN, "optimizer.lr=0.001", f"train.steps={STEPS}", "checkpoint.interval=3")

# name: (ranks, overrides)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ("zero.stage=0",)),
    "dp2": (2, ()),
    "dp4": (4, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "tp2+sp": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pp2": (2, ("parallel.pipeline=2",)),
    "pp4": (4, ("parallel.pipeline=4",)),
    "pp2v2": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "tp2xpp2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
    "tp2xdp2": (4, ("parallel.tensor=2",)),
    "pp2xdp2": (4, ("parallel.pipeline=2",)),
    "pp2v2xdp2": (4, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
}
# (layout, ZeRO stage) that is killed, the one that goes on, tied embeddings. Every stage and every kind of
# parallelism stands on both sides, with tied embeddings and without.
PAIRS = [
    (("dp2", 1), ("tp2", 0), False),
    (("tp2", 0), ("pp2", 2), False),
    (("pp2", 2), ("dp2", 3), False),
    (("dp2", 3), ("1", 0), False),
    (("1", 0), ("dp4", 1), False),
    (("dp4", 2), ("tp2xpp2", 1), False),
    (("tp2xpp2", 1), ("pp2xdp2", 3), False),
    (("pp2v2", 2), ("tp2xdp2", 3), False),
    (("pp2xdp2", 3), ("tp2xdp2", 0), True),
    (("tp2+sp", 3), ("pp2v2", 1), True),
    (("pp2v2", 1), ("dp2", 2), True),
    (("tp2xdp2", 2), ("pp2xdp2", 1), True),
    (("pp4", 1), ("dp4", 3), True),
    (("dp4", 3), ("pp2v2xdp2", 0), True),
    (("pp2xdp2", 2), ("tp2+sp", 1), True),
    (("1", 0), ("tp2xpp2", 3), True),
]
# What every landing runs; every stage and every kind of parallelism on both sides once. The others: nightly.
NEVER_LEFT_OUT = [PAIRS[number] for number in (0, 1, 2, 7, 9, 14, 15)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus and the two uninterrupted runs. 160 samples of 119 sequences: an epoch ends."""
    folder = tmp_path_factory.mktemp("kill")
    write_corpus(folder, num_documents=6)
    for is_tied in (False, True):
        with start(folder, f"reference_{is_tied}", ("1", 0), is_tied, "samples") as job:
            (end,) = job.wait()
        assert end.exit_code == 0, end.output
    return folder


def start(folder: Path, run: str, layout: tuple[str, int], is_tied: bool, samples: str) -> ForkedJob:
    """samples: folder in the run's where each rank notes what it trains on."""
    num_ranks, overrides = LAYOUTS[layout[0]]
    settings = (*RUN, *overrides, f"zero.stage={layout[1]}", f"model.tie_embeddings={is_tied}")
    (folder / run / samples).mkdir(parents=True)
    return ForkedJob(
        folder,
        "train",
        *(*settings, f"run.dir={run}"),
        num_ranks=num_ranks,
        sabotage=record_samples,
        environment={SAMPLES: str(folder / run / samples)},
    )


def kill_at_random(job: ForkedJob, run: Path, generator: random.Random) -> int:
    """SIGKILL to all ranks some time after a random step; returns the number of steps in metrics.jsonl."""
    step = generator.randrange(1, STEPS - 1)
    deadline = time.monotonic() + 120
    while len(read_rows(run)) < step and job.is_alive:
        assert time.monotonic() < deadline, f"no step {step} within two minutes"
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.1))
    job.kill()
    return len(read_rows(run))


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after", "is_tied"),
    [pytest.param(*pair, marks=() if pair in NEVER_LEFT_OUT else pytest.mark.nightly) for pair in PAIRS],
)
def test_a_job_killed_under_one_layout_goes_on_under_another(
    before: tuple[str, int], after: tuple[str, int], is_tied: bool, folder: Path
) -> None:
    name = f"{before[0]}z{before[1]}-{after[0]}z{after[1]}-{is_tied}"
    run, reference = folder / name, folder / f"reference_{is_tied}"
    generator = random.Random(name)
    with start(folder, name, before, is_tied, "samples_a") as job:
        kill_at_random(job, run, generator)
    assert len(read_rows(run)) >= 1, "killed before its first step"
    with start(folder, name, after, is_tied, "samples_b") as job:
        for end in job.wait():
            assert end.exit_code == 0, end.output
    assert status(run)["state"] == "completed"
    expected = curve(reference)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1))
    for found, wanted in zip(curve(run), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    samples = recorded_samples([run / "samples_a", run / "samples_b"])
    assert samples == recorded_samples([reference / "samples"])

"""A step waits for the device once: for the verdict. Not for a microbatch, and not for the update."""

from __future__ import annotations

import host_syncs
import jobs
import pytest
import torch
from by_day import DAY_AND_NIGHT
from deepspeed.accelerator import get_accelerator
from harness import run_ranks

VERDICT = "wait_for_verdict"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("parallel.tensor=2",)),
    "pp2": (2, ("parallel.pipeline=2", "model.tie_embeddings=true")),
    "pp2 interleaved": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2")),
}


def places_of_last_step(rank: int, cases: list[tuple[str, ...]]) -> list[list[str]]:
    """Where the third step of each job waits: DeepSpeed's timer, for one, rests in the first two."""
    found = []
    for overrides in cases:
        config = jobs.make_config(*overrides)
        engine = jobs.build_engine(config)
        for step in range(3):
            batch = jobs.microbatches(step, config, engine.groups)
            with host_syncs.counted() as places:
                engine.train_step(batch, config.optimizer.lr)
        found.append(places)
        jobs.finish(engine)
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", DAY_AND_NIGHT)
def test_a_step_waits_once_however_many_microbatches(part: int, layout: str) -> None:
    num_ranks, settings = LAYOUTS[layout]
    sizes = {"1": (16, 4), "dp2": (8, 2), "tp2": (4,)}.get(layout, (4, 2))
    cases = [
        (*settings, f"zero.stage={stage}", f"train.precision={precision}", f"train.micro_batch_size={size}")
        for row, (stage, precision) in enumerate(
            ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (1, "bf16"))
        )
        for column, size in enumerate(sizes)
        if (row + column) % 2 == part
    ]
    for of_rank in run_ranks(num_ranks, places_of_last_step, cases, deadline_seconds=240):
        for case, places in zip(cases, of_rank, strict=True):
            assert len(places) == 1, (case, places)
            assert places[0].endswith(VERDICT), (case, places)


def test_the_counter_sees_what_waits() -> None:
    tensor = torch.ones(3)
    for waiting in (
        lambda: tensor[0].item(),
        lambda: float(tensor[0]),
        lambda: bool(tensor[0] > 0),
        lambda: tensor.tolist(),
        lambda: tensor.cpu(),
        lambda: tensor[tensor > 0],
        lambda: get_accelerator().synchronize(),
    ):
        with host_syncs.counted() as places:
            waiting()
        assert len(places) == 1
    with host_syncs.counted() as places:
        (tensor * 2).sum()
    assert not places

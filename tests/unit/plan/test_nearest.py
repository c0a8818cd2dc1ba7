"""Refused layouts lead to legal ones nearby, quickly."""

import gc
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import config_of

from distllm.config import compose, rules
from distllm.config.problems import UserError
from distllm.config.schema import Config
from distllm.plan.nearest import Proposal, changed, nearest_layouts

LONGEST_SECONDS = 0.5
BASE = config_of("world_size=1")


def refused(*overrides: str) -> tuple[Config, int]:
    request = compose.parse("check", overrides)
    with pytest.raises(UserError) as caught:
        compose.load(request)
    assert caught.value.config is not None
    return caught.value.config, request.world_size


def proposals_for(*overrides: str) -> list[Proposal]:
    config_and_world_size = refused(*overrides)
    # A collection of all that earlier tests have left takes half a second by itself.
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        proposals = nearest_layouts(*config_and_world_size)
        assert time.process_time() - start < LONGEST_SECONDS
    finally:
        gc.enable()
    return proposals


def test_the_nearest_come_first_and_none_only_adds_to_another() -> None:
    proposals = proposals_for("parallel.tensor=3", "world_size=8")
    assert [proposal.overrides[0] for proposal in proposals[:2]] == ["parallel.tensor=4", "parallel.tensor=2"]
    distances = [proposal.distance for proposal in proposals]
    assert distances == sorted(distances)
    assert len(proposals) == 3
    for i, later in enumerate(proposals):
        assert not any(earlier.changes.items() <= later.changes.items() for earlier in proposals[:i])


@pytest.mark.parametrize(
    ("refused_overrides", "nearest"),
    [
        ("parallel.sequence=true world_size=1", "parallel.sequence=false"),
        ("zero.stage=0 zero.offload_optimizer=true world_size=1", "zero.stage=1"),
        ("train.micro_batch_size=3 world_size=1", "train.micro_batch_size=4"),
        ("parallel.first_stage_layers=3 world_size=1", "parallel.first_stage_layers=null"),
        (
            "parallel.pipeline=2 recompute=full recompute.num_layers=5 world_size=2",
            "recompute.num_layers=null",
        ),
        ("parallel.pipeline=2 parallel.virtual_pipeline=2 world_size=2", "parallel.virtual_pipeline=3"),
        ("world_size=7", "train.global_batch_size=28"),
        (
            "parallel.pipeline=4 world_size=4",
            "parallel.embedding_as_layer=true parallel.loss_as_layer=true",
        ),
    ],
)
def test_one_change_is_proposed_where_one_is_enough(refused_overrides: str, nearest: str) -> None:
    texts = [" ".join(proposal.overrides) for proposal in proposals_for(*refused_overrides.split())]
    assert nearest in texts


@settings(deadline=None)
@given(
    tensor=st.integers(1, 20),
    pipeline=st.integers(1, 20),
    virtual=st.integers(1, 5),
    world_size=st.integers(1, 512),
    batch=st.integers(1, 600),
    uneven=st.sampled_from(["parallel.first_stage_layers", "parallel.loss_as_layer", ""]),
)
def test_what_is_proposed_is_legal(
    tensor: int, pipeline: int, virtual: int, world_size: int, batch: int, uneven: str
) -> None:
    settings = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": virtual,
        "train.global_batch_size": batch,
    }
    config = changed(BASE, settings | ({uneven: uneven.endswith("loss_as_layer") or 3} if uneven else {}))
    proposals = nearest_layouts(config, world_size)
    assert bool(proposals) == bool(rules.check(config, world_size)), "some layout is always legal"
    for proposal in proposals:
        assert rules.check(proposal.config, world_size) == []
        assert changed(config, proposal.changes) == proposal.config


def test_what_is_proposed_can_be_typed() -> None:
    written = (
        "parallel.tensor=2",
        "parallel.first_stage_layers=3",
        "parallel.loss_as_layer=true",
        "world_size=4",
    )
    for proposal in proposals_for(*written):
        assert compose.load(compose.parse("check", [*written, *proposal.overrides])) == proposal.config


@pytest.mark.parametrize("world_size", [15_120, 16_384, 16_381])
def test_large_worlds_are_quick(world_size: int) -> None:
    """15,120 has 80 divisors, 16,381 is prime."""
    proposals = proposals_for(
        "model=llama3_405b",
        "parallel.tensor=16",
        "parallel.pipeline=16",
        "parallel.virtual_pipeline=4",
        "train.global_batch_size=2048",
        f"world_size={world_size}",
    )
    assert len(proposals) >= 1


def test_what_no_layout_can_mend_gets_no_proposal() -> None:
    assert proposals_for("schedule=constant", "schedule.min_lr=1e-5", "world_size=1") == []

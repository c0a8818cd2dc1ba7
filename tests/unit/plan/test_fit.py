"""What does not fit its device is refused, with a layout that fits, is typed and is legal."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LLAMA_VOCABULARY, config_of

from distllm.config import compose
from distllm.config.problems import Problem, UserError
from distllm.config.schema import Config
from distllm.layout.grid import Grid
from distllm.plan.fit import DeviceLimit, limit_of, misfit
from distllm.plan.memory import estimate_memory
from distllm.plan.nearest import changed, nearest_layouts

LONGEST_SECONDS = 10.0  # of processor time; where nothing fits, some seconds
GIB = 2**30
LLAMA = (
    f"tokenizer.vocab_size={LLAMA_VOCABULARY}",
    "train.precision=bf16",
    "train.micro_batch_size=1",
    "train.global_batch_size=1024",
)
H100 = "cluster=h100_80gb"
SMALL = config_of("train.micro_batch_size=1", "world_size=8")


def load(*overrides: str) -> Config:
    return compose.load(compose.parse("check", overrides))


def refusal(*overrides: str) -> Problem:
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert time.process_time() - start < LONGEST_SECONDS
    (problem,) = caught.value.problems
    assert problem.setting == "cluster.memory_gib"
    return problem


def needed(config: Config, world_size: int, vocab_size: int = 300) -> int:
    return sum(estimate_memory(config, vocab_size, Grid.of(config.parallel, world_size)).values())


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=llama3_8b", "parallel.tensor=2", "parallel.sequence=true"),
        ("model=llama3_8b", "recompute=full"),
        ("model=llama3_70b", "zero.stage=3", "recompute=full"),
        ("model=llama3_70b", "zero.stage=3", "parallel.tensor=8", "parallel.sequence=true"),
    ],
)
def test_known_jobs_fit_64_h100(overrides: tuple[str, ...]) -> None:
    config = load(*overrides, *LLAMA, H100, "world_size=64")
    assert 0.2 * 79.1 * GIB < needed(config, 64, LLAMA_VOCABULARY) < 79.1 * GIB


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (("model=llama3_8b",), "activations"),  # 43.5 GiB of them, and 44.9 GiB of weights and gradients
        (("model=llama3_70b", "recompute=full"), "gradients"),  # 4 x 70.55e9 bytes: stage 1 keeps them whole
        (("model=llama3_70b", "zero.stage=3"), "activations"),
    ],
)
def test_known_jobs_do_not_fit_64_h100(overrides: tuple[str, ...], kind: str) -> None:
    written = (*overrides, *LLAMA, H100, "world_size=64")
    problem = refusal(*written)
    assert f"needs ({kind} " in problem.rule
    fixed = load(*written, *problem.fix.split())  # typed behind the refused command, it is accepted
    assert needed(fixed, 64, LLAMA_VOCABULARY) <= 79.1 * GIB
    load(*written, "cluster=none")
    load(*written, "cluster=cpu")


@pytest.mark.parametrize("world_size", [8, 16])
def test_405b_on_few_gpus_is_told_how_many_it_takes(world_size: int) -> None:
    written = ("model=llama3_405b", *LLAMA, H100)
    problem = refusal(*written, f"world_size={world_size}")
    *overrides, ranks = problem.fix.split()
    more = int(ranks.removeprefix("world_size="))
    fixed = load(*written, *overrides, ranks)
    assert needed(fixed, more, LLAMA_VOCABULARY) <= 79.1 * GIB
    # 405.85e9 parameters have 18 bytes each: half as many GPUs of 79.1 GiB could hold them barely or not.
    assert 405.85e9 * 18 / (79.1 * GIB) < more <= 256


def test_what_no_number_of_ranks_mends_names_what_else_there_is() -> None:
    problem = refusal("model=llama3_8b", *LLAMA, "cluster=h100_80gb", "cluster.memory_gib=2", "world_size=4")
    assert problem.fix == "a smaller model.seq_length, or a device with more memory"


def test_proposals_fit_and_the_nearest_come_first() -> None:
    job = ("model=llama3_70b", *LLAMA, "zero.stage=3", "world_size=64")
    config = load(*job)
    limit = DeviceLimit(int(79.1 * GIB), LLAMA_VOCABULARY)
    assert nearest_layouts(config, 64) == []  # it is legal
    found = nearest_layouts(config, 64, limit=limit)
    assert [proposal.distance for proposal in found] == sorted(proposal.distance for proposal in found)
    assert found[0].overrides == ["recompute.granularity=full"]
    for proposal in found:
        assert needed(proposal.config, 64, LLAMA_VOCABULARY) <= limit.memory_bytes


def test_smaller_micro_batches_are_tried() -> None:
    config = load("model=llama3_8b", *LLAMA, "train.micro_batch_size=4", "parallel.tensor=2", "world_size=64")
    limit = DeviceLimit(int(79.1 * GIB), LLAMA_VOCABULARY)
    texts = [" ".join(proposal.overrides) for proposal in nearest_layouts(config, 64, most=5, limit=limit)]
    assert "train.micro_batch_size=2" in texts or "train.micro_batch_size=1" in texts


@settings(deadline=None, max_examples=20)
@given(
    mib=st.integers(40, 600),
    tensor=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2]),
    zero=st.integers(0, 3),
    batch=st.sampled_from([8, 16, 32]),
)
def test_a_fix_fits_and_more_memory_refuses_nothing(
    mib: int, tensor: int, pipeline: int, zero: int, batch: int
) -> None:
    changes = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "zero.stage": zero,
        "train.global_batch_size": batch,
        "zero.bucket_size": 1000,
        "cluster.device": "cpu",
    }
    small = changed(SMALL, changes | {"cluster.memory_gib": mib / 1024})
    larger = changed(small, {"cluster.memory_gib": mib / 512})
    problem = misfit(small, 300, 8, "world_size={}")
    assert (problem is None) == (needed(small, 8) <= mib * 2**20)
    if problem is None:
        assert misfit(larger, 300, 8, "world_size={}") is None
    limit = limit_of(small, 300)
    assert limit
    for proposal in nearest_layouts(small, 8, limit=limit):
        assert problem
        assert needed(proposal.config, 8) <= limit.memory_bytes
        assert limit.may_hold(small, proposal.changes, 8), "the lower bound is above the account"


@settings(deadline=None, max_examples=50)
@given(
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4, 8]),
    zero=st.integers(0, 3),
    precision=st.sampled_from(["fp32", "bf16"]),
    full=st.booleans(),
)
def test_the_quick_bound_is_never_above_the_account(
    tensor: int, pipeline: int, zero: int, precision: str, full: bool
) -> None:
    changes = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "zero.stage": zero,
        "recompute.granularity": "full" if full else "none",
    }
    base = changed(
        SMALL, {"train.precision": precision, "train.global_batch_size": 32, "cluster.device": "cpu"}
    )
    account = needed(changed(base, changes), 32)
    assert DeviceLimit(account, 300).may_hold(base, changes, 32)
    assert not DeviceLimit(account // 100, 300).may_hold(base, changes, 32) or pipeline * tensor > 1

"""Gradients as the engines keep them, by hand; tests/ranks/test_memory_measured.py asks the ranks."""

from __future__ import annotations

import pytest
from shapes import config_of, held

from distllm.plan.gradients import backward_gradients, host_bytes, update_gradients
from distllm.plan.memory import rank_memory
from distllm.plan.partition import group_partitions, spanned_numel
from distllm.plan.rank_view import RankView

# A norm of 8 elements, not decayed, and four matrices of 100.
SHAPES = {"norm.weight": (8,)} | {f"{i}.weight": (10, 10) for i in range(4)}
FP32 = ("train.precision=fp32",)
BF16 = ("train.precision=bf16",)
BF16_GRADIENTS = (*BF16, "train.gradient_accumulation=bf16")
OFFLOAD = "zero.offload_optimizer=true"
MICROBATCHES = ("world_size=1", "train.global_batch_size=16", "train.micro_batch_size=4")


@pytest.mark.parametrize(
    ("stage", "overrides", "backward", "update"),
    [
        (0, FP32, 4 * 408, 4 * 408),
        (0, BF16, 4 * 408, 4 * 408),
        (0, BF16_GRADIENTS, 2 * 408, (2 + 4) * 408),
        (1, FP32, 4 * 408, 4 * 408),
        (1, BF16, 4 * 408, 4 * 408),
        (1, BF16_GRADIENTS, 2 * 408, 2 * 408 + 4 * 208),  # parts begin at multiples of 8
        (2, FP32, 2 * 4 * 208, 4 * 208 + 4 * 200),
        (2, BF16, 4 * 204, 4 * 204),
        (2, BF16_GRADIENTS, 2 * 2 * 208, 2 * 208 + 4 * 200),
        (3, FP32, 4 * 204, 4 * 204 + 4 * 200),
        (3, BF16_GRADIENTS, 2 * 204, 2 * 204 + 4 * 200),
        (1, (*FP32, OFFLOAD), 4 * 408, 4 * 408),
        (1, (*BF16, OFFLOAD), 4 * 408, 4 * 408 + 4 * 204),
        (2, (*FP32, OFFLOAD), 0, 0),
        (2, (*BF16, OFFLOAD), 4 * 204, 4 * 204),
        (3, (*BF16, OFFLOAD), 0, 0),
    ],
)
def test_gradients_on_the_device_of_two_ranks(
    stage: int, overrides: tuple[str, ...], backward: int, update: int
) -> None:
    """204 elements in a partition; 208 in the parameters that it spans, since both ranks span the norm."""
    config = config_of(*MICROBATCHES, *overrides, f"zero.stage={stage}")
    assert backward_gradients(config, held(SHAPES), 2) == backward
    assert update_gradients(config, held(SHAPES), 2) == update


def test_a_single_microbatch_is_added_to_nothing() -> None:
    config = config_of(
        *FP32, "zero.stage=2", "world_size=1", "train.global_batch_size=8", "train.micro_batch_size=4"
    )
    assert backward_gradients(config, held(SHAPES), 2) == 4 * 208


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        (1, FP32, 4 * 204 + 4 * (204 + 100)),
        (2, FP32, 4 * 204 + 4 * (204 + 100) + 4 * 208),
        (2, BF16, 4 * 204 + 2 * (204 + 100)),
        (3, BF16, 4 * 204 + 4 * 204),
    ],
)
def test_host_memory_beside_the_states(stage: int, overrides: tuple[str, ...], expected: int) -> None:
    config = config_of(*MICROBATCHES, *overrides, OFFLOAD, f"zero.stage={stage}")
    assert host_bytes(config, held(SHAPES), 2) == expected


def test_parameters_that_are_cut_through_count_whole() -> None:
    assert group_partitions(held(SHAPES), 1, 3) == [134, 4]
    assert spanned_numel(held(SHAPES), 3) == 8 + 200  # [0, 134), [134, 268), [268, 402) cut two matrices each
    assert spanned_numel(held(SHAPES), 8) == 8 + 100  # [50 i, 50 i + 50) lie in one


def test_copies_for_the_update_count_where_activations_do_not_cover_them() -> None:
    """At stage 3 on one rank the copy of the gradients is as large as they; activations come first."""
    few = config_of(*FP32, "zero.stage=3", "world_size=1", "train.micro_batch_size=1", "model.seq_length=8")
    memory = rank_memory(RankView.of(few, 300, 1, 0))
    assert memory.update_copies > 0
    assert memory.gradients + memory.activations + memory.loss + memory.update_copies == pytest.approx(
        2 * memory.gradients, rel=1e-3
    )
    many = config_of(*FP32, "zero.stage=3", "world_size=1", "train.micro_batch_size=16")
    assert rank_memory(RankView.of(many, 300, 1, 0)).update_copies == 0

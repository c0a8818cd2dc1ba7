"""Bytes per rank against the ZeRO paper and hand-computed layouts of Llama 3."""

import pytest
from shapes import LLAMA_VOCABULARY, config_of, held, llama

from distllm.plan.memory import estimate_memory, model_states, partition_numel, rank_memory
from distllm.plan.rank_view import RankView

PAPER = ("train.gradient_accumulation=bf16", "zero.persistence_threshold=0")
ONE = {"decoder.layers.0.mlp.linear_fc1.weight": (1000, 768)}
PSI = 768_000
EIGHT_B = 8_030_261_248


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    [(0, 2 + 2 + 12), (1, 2 + 2 + 12 / 64), (2, 2 + (2 + 12) / 64), (3, (2 + 2 + 12) / 64)],
)
def test_model_states_of_the_zero_paper(stage: int, bytes_per_parameter: float) -> None:
    """arXiv:1910.02054, figure 1: mixed precision with Adam, 2 + 2 + 12 bytes, over 64 ranks."""
    config = config_of("train.precision=bf16", *PAPER, f"zero.stage={stage}", "world_size=1")
    assert sum(model_states(config, held(ONE), dp_size=64)) == bytes_per_parameter * PSI


def test_the_example_of_the_zero_paper() -> None:
    """7.5 billion parameters on 64 ranks: 120, 31.4, 16.6 and 1.9 GB (figure 1)."""
    shapes = {"decoder.layers.0.mlp.linear_fc1.weight": (7_500_000, 1000)}
    found = [
        sum(
            model_states(
                config_of("train.precision=bf16", *PAPER, f"zero.stage={s}", "world_size=1"), held(shapes), 64
            )
        )
        for s in range(4)
    ]
    assert [round(size / 1e9, 1) for size in found] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [
        (("train.precision=bf16", "zero.stage=0"), (2, 4, 12)),
        (("train.precision=fp32", "zero.stage=0"), (4, 4, 8)),
        (("train.precision=fp32", "zero.stage=1"), (4, 4, 8 / 4)),
        (("train.precision=bf16", "zero.stage=2"), (2, 4 / 4, 12 / 4)),
        (("train.precision=bf16", "zero.stage=3", "zero.persistence_threshold=0"), (2 / 4, 4 / 4, 12 / 4)),
    ],
)
def test_model_states_by_precision(
    overrides: tuple[str, ...], bytes_per_parameter: tuple[float, ...]
) -> None:
    config = config_of(*overrides, "world_size=1")
    assert model_states(config, held(ONE), dp_size=4) == tuple(b * PSI for b in bytes_per_parameter)


def test_padding_is_that_of_the_engines() -> None:
    shapes = {"a.weight": (5, 5), "a.bias": (3,), "b.weight": (7, 1)}

    def part(*overrides: str) -> int:
        return partition_numel(config_of(*overrides, "world_size=1"), held(shapes), 4)

    assert part("zero.stage=0") == 35
    assert part("zero.stage=1") == 16  # 35 / 4, to a multiple of 8
    assert part("zero.stage=1", "zero.bucket_size=56") == 8 + 8 + 8  # 3 / 4, and two of an eighth and more
    deepspeed = 8 + 2  # (25 + 7) / 4 and 3 / 4
    assert part("zero.stage=1", "zero.offload_optimizer=true") == part("zero.stage=2") == deepspeed
    assert part("zero.stage=3") == 7 + 1 + 2


def test_small_parameters_stay_whole_at_stage_3() -> None:
    shapes = {"norm.weight": (100,), "a.weight": (1000, 1000)}
    config = config_of(
        "train.precision=bf16", "zero.stage=3", "zero.persistence_threshold=1000", "world_size=1"
    )
    weights, _, _ = model_states(config, held(shapes), dp_size=10)
    assert weights == 2 * (10 + 100_000 + 100)


def test_llama_8b_on_8_ranks_by_hand() -> None:
    config = llama("llama3_8b", "zero.stage=1", "train.micro_batch_size=1", "world_size=8")
    memory = rank_memory(RankView.of(config, LLAMA_VOCABULARY, 8, 0))
    assert memory.weights == 2 * EIGHT_B
    assert memory.gradients == 4 * EIGHT_B
    assert memory.optimizer_states == pytest.approx(12 * EIGHT_B / 8, rel=1e-6)
    assert memory.activations == 8192 * 2 * 32 * 89_088
    # 1,024 tokens at a time; gradients of 8,192 hidden states and of the output layer wait.
    assert memory.loss == 1024 * LLAMA_VOCABULARY * (4 + 2) + (8192 + LLAMA_VOCABULARY) * 4096 * 2
    assert memory.host == 0
    assert memory.total == sum(
        estimate_memory(config, LLAMA_VOCABULARY, RankView.of(config, LLAMA_VOCABULARY, 8, 0).grid).values()
    )


def test_llama_405b_on_16384_ranks_by_hand() -> None:
    """The layout of arXiv:2407.21783, table 4: tensor 8, pipeline 16, data 128 (there with FSDP)."""
    config = llama(
        "llama3_405b",
        "parallel.tensor=8",
        "parallel.sequence=true",
        "parallel.pipeline=16",
        "parallel.embedding_as_layer=true",
        "parallel.loss_as_layer=true",
        "train.micro_batch_size=1",
        "train.global_batch_size=2048",
        "world_size=16384",
    )
    hidden, ffn, table = 16_384, 53_248, 128_256 * 16_384
    layer = hidden * (hidden + 2 * 1024) + hidden * hidden + 3 * hidden * ffn
    first = rank_memory(RankView.of(config, LLAMA_VOCABULARY, 128, 0))
    middle = rank_memory(RankView.of(config, LLAMA_VOCABULARY, 128, 7))
    last = rank_memory(RankView.of(config, LLAMA_VOCABULARY, 128, 15))
    assert first.weights == 2 * ((7 * layer + table) // 8 + 7 * 2 * hidden)
    assert middle.weights == 2 * (8 * layer // 8 + 8 * 2 * hidden)
    assert last.weights == first.weights + 2 * hidden  # the final norm
    per_token = (4 * hidden + (hidden + 2048) + hidden + (hidden + 1024) + 4 * ffn) // 8
    assert first.activations == 16 * 8192 * 2 * 7 * per_token  # 16 microbatches in flight
    assert middle.activations == 9 * 8192 * 2 * 8 * per_token
    rows = LLAMA_VOCABULARY // 8
    chunk = 2**24 // rows  # tokens
    assert (first.loss, last.loss) == (0, chunk * rows * (4 + 2) + (8192 + rows) * hidden * 2)


def test_offloaded_states_are_counted_in_host_memory() -> None:
    config = config_of("zero.offload_optimizer=true", "train.precision=bf16", "world_size=4")
    resident = config_of("train.precision=bf16", "world_size=4")
    there, here = rank_memory(RankView.of(config, 300, 4, 0)), rank_memory(RankView.of(resident, 300, 4, 0))
    assert (there.optimizer_states, here.host) == (0, 0)
    part = here.optimizer_states // 12
    largest = 1408 * 256  # the first projection of the MLP
    # fp32 gradients to compute with; new bf16 weights, and bf16 gradients, on their way
    assert there.host == here.optimizer_states + 4 * part + 2 * (part + largest)
    assert "host" not in estimate_memory(config, 300, RankView.of(config, 300, 4, 0).grid)


def test_the_estimate_is_that_of_the_fullest_stage() -> None:
    config = config_of("parallel.pipeline=4", "world_size=4")
    totals = [rank_memory(RankView.of(config, 300, 1, stage)).total for stage in range(4)]
    assert (
        sum(estimate_memory(config, 300, RankView.of(config, 300, 1, 0).grid).values())
        == max(totals)
        == totals[0]
    )

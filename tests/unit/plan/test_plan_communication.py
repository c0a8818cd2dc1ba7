"""Bytes sent per step against the relations that papers publish, and by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import LLAMA_VOCABULARY, config_of, llama

from distllm.config.schema import Config
from distllm.layout.grid import Grid
from distllm.layout.traffic import Amount, Transfer, add_up, sent_bytes
from distllm.layout.whole import WholeLimits
from distllm.plan.communication import busiest_stage, rank_sent_bytes, rank_traffic
from distllm.plan.gather import passes
from distllm.plan.live import gathered_parameters
from distllm.plan.rank_view import RankView

VOCABULARY = 384  # a multiple of what it is padded to
ONE_MICROBATCH = ("train.global_batch_size=64", "train.micro_batch_size=1")


def sent(config: Config, dp_size: int, group: str, stage: int = 0, vocabulary: int = VOCABULARY) -> float:
    grid = Grid(dp_size, config.parallel.tensor, config.parallel.pipeline)
    return rank_sent_bytes(rank_traffic(RankView.of(config, vocabulary, dp_size, stage)), grid).get(
        group, 0.0
    )


def traffic_of(*overrides: str, dp_size: int = 1, stage: int = 0) -> dict[Transfer, Amount]:
    return rank_traffic(RankView.of(config_of(*overrides), VOCABULARY, dp_size, stage))


def psi(config: Config) -> int:
    return RankView.of(config, VOCABULARY, 1, 0).held.numel


def test_volumes_of_the_zero_paper() -> None:
    """arXiv:1910.02054, section 7: 2 Psi without ZeRO and at stage 1. DeepSpeed's stage 2 all-reduces,
    then gathers: 3 Psi, where the paper has 2. Its stage 3 has the paper's 3 Psi if nothing is kept."""
    ranks = 64
    for stage, volume in ((0, 2), (1, 2), (2, 3)):
        config = config_of(f"zero.stage={stage}", "world_size=64", *ONE_MICROBATCH)
        expected = volume * psi(config) * 4 * (ranks - 1) / ranks
        assert sent(config, ranks, "data") == pytest.approx(expected, rel=1e-3), stage


UNLIMITED = WholeLimits(10**12, 10**12)


def test_stage_3_gathers_twice_where_nothing_stays() -> None:
    """For the forward and for the backward pass: with the gradients 3 Psi."""
    untied = ("model.tie_embeddings=false", "zero.persistence_threshold=0")
    config = config_of("zero.stage=3", *untied, "world_size=64", *ONE_MICROBATCH)
    view = RankView.of(config, VOCABULARY, 1, 0)
    table = VOCABULARY * config.model.hidden_size
    all_released = gathered_parameters(view, 1, WholeLimits(0, 0))
    nothing_released = gathered_parameters(view, 1, UNLIMITED)
    assert sum(nothing_released) == psi(config)
    assert sum(all_released) == 2 * psi(config)
    some = gathered_parameters(view, 1, WholeLimits(psi(config) // 2, 0))
    assert sum(nothing_released) < sum(some) < sum(all_released)
    assert table in nothing_released


def test_stage_3_gathers_the_embedding_for_every_microbatch() -> None:
    config = config_of("zero.stage=3", "zero.persistence_threshold=0", "world_size=1")
    view = RankView.of(config, VOCABULARY, 1, 0)
    table = VOCABULARY * config.model.hidden_size
    assert sum(gathered_parameters(view, 5, UNLIMITED)) == psi(config) + 4 * table


@pytest.mark.parametrize(("stage", "grows"), [(0, False), (1, False), (2, True), (3, True)])
def test_what_accumulation_costs(stage: int, grows: bool) -> None:
    """Twice as many microbatches: gradients are reduced once per step, or in each from stage 2 on."""
    few, many = (
        config_of(
            f"zero.stage={stage}",
            "world_size=4",
            f"train.micro_batch_size={size}",
            "train.global_batch_size=32",
        )
        for size in (4, 2)
    )
    assert (sent(many, 4, "data") > 1.2 * sent(few, 4, "data")) == grows
    if not grows:
        assert sent(many, 4, "data") == sent(few, 4, "data")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_go_in_bf16_and_gradients_in_the_type_that_they_are_summed_in(stage: int) -> None:
    def bytes_of(*precision: str) -> tuple[int, int]:
        """(of weights, of gradients)"""
        traffic = traffic_of(f"zero.stage={stage}", *precision, "world_size=4", dp_size=4)
        weights = traffic.get(Transfer("data", "all_gather"), Amount(0, 0)).bytes
        reduced = [amount.bytes for transfer, amount in traffic.items() if "reduce" in transfer.kind]
        return weights, sum(reduced)

    weights, gradients = bytes_of("train.precision=fp32")
    half = (weights / 2, gradients / 2)
    # Norms and flags of a few bytes are not halved.
    assert bytes_of("train.precision=bf16") == pytest.approx((half[0], gradients), rel=1e-3)
    both = bytes_of("train.precision=bf16", "train.gradient_accumulation=bf16")
    assert both == pytest.approx(half, rel=1e-3)


def test_tensor_parallel_layers_by_hand() -> None:
    """Four all-reduces of a layer's activations (arXiv:1909.08053), and one at each end of the model."""
    config = llama(
        "llama3_8b",
        "parallel.tensor=8",
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
        "world_size=8",
    )
    activation = 8192 * 4096 * 2
    (calls, size) = rank_traffic(RankView.of(config, LLAMA_VOCABULARY, 1, 0))[
        Transfer("tensor", "all_reduce")
    ]
    loss_chunks = 8192 // 1047 + 1  # 2^24 logits, 16,032 rows
    assert (calls, size) == (4 * 32 + 2 + 2 * loss_chunks, (4 * 32 + 2) * activation + 12 * 8192)


def test_sequence_parallelism_sends_as_much_but_for_inputs_gathered_again() -> None:
    """An all-reduce is a reduce-scatter and an all-gather (arXiv:2205.05198, section 4.2.2); the inputs of
    both column-parallel projections are gathered once more, and so is that of the output layer never."""
    plain, cut = (
        config_of(
            "parallel.tensor=4",
            f"parallel.sequence={s}",
            "model.hidden_size=512",
            "model.num_attention_heads=8",
            "model.num_query_groups=8",
            "world_size=4",
        )
        for s in ("false", "true")
    )
    layers = plain.model.num_layers
    messages = 4 * layers + 2
    expected = (2 * messages + 2 * layers) / (2 * messages)
    assert sent(cut, 1, "tensor") / sent(plain, 1, "tensor") == pytest.approx(expected, rel=0.01)


def test_recomputation_repeats_the_way_forward() -> None:
    def calls(how: str) -> int:
        return traffic_of("parallel.tensor=2", f"recompute={how}", "world_size=2", *ONE_MICROBATCH)[
            Transfer("tensor", "all_reduce")
        ].calls

    assert calls("selective") == calls("none")
    assert calls("full") - calls("none") == 64 * 2 * 8  # microbatches, reductions, layers


def test_interleaving_sends_as_often_as_there_are_chunks() -> None:
    """arXiv:2104.04473, section 2.2: v times the communication, but for the two ends of the model."""
    plain = traffic_of("parallel.pipeline=4", "world_size=4", stage=1)
    cut = traffic_of("parallel.pipeline=4", "parallel.virtual_pipeline=2", "world_size=4", stage=1)
    send = Transfer("pipeline", "send")
    assert (cut[send].calls, cut[send].bytes) == (2 * plain[send].calls, 2 * plain[send].bytes)
    first = traffic_of("parallel.pipeline=4", "world_size=4", stage=0)
    assert first[send].calls * 2 == plain[send].calls


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 12))
def test_what_one_stage_sends_another_receives(pipeline: int, chunks: int, more: int) -> None:
    """Over all stages, whatever the group; and the schedule runs each chunk both ways for each microbatch."""
    layers, microbatches = pipeline * chunks, pipeline * more
    config = config_of(
        f"model.num_layers={layers}",
        f"parallel.pipeline={pipeline}",
        f"parallel.virtual_pipeline={chunks if pipeline > 1 else 1}",
        f"train.global_batch_size={microbatches}",
        "train.micro_batch_size=1",
        f"world_size={pipeline}",
    )
    total = {"send": 0, "recv": 0}
    for stage in range(pipeline):
        for (_, kind), amount in rank_traffic(RankView.of(config, VOCABULARY, 1, stage)).items():
            if kind in total:
                total[kind] += amount.bytes
        run = list(passes(stage, pipeline, config.parallel.virtual_pipeline, microbatches))
        for chunk in range(config.parallel.virtual_pipeline):
            assert run.count((chunk, True)) == run.count((chunk, False)) == microbatches
    assert total["send"] == total["recv"]
    assert (total["send"] > 0) == (pipeline > 1)


def test_a_single_rank_sends_nothing() -> None:
    assert traffic_of("world_size=1") == {}


def test_weights_of_tokens_cost_one_small_sum() -> None:
    config = config_of("zero.stage=0", "world_size=2")
    without = rank_traffic(RankView.of(config, VOCABULARY, 2, 0), has_weights=False)[
        Transfer("data", "all_reduce")
    ]
    with_them = rank_traffic(RankView.of(config, VOCABULARY, 2, 0), has_weights=True)[
        Transfer("data", "all_reduce")
    ]
    assert (with_them.calls - without.calls, with_them.bytes - without.bytes) == (1, 8)


def test_ring_factors_of_nccl_tests() -> None:
    assert sent_bytes("all_reduce", 800, 8) == 1400
    assert sent_bytes("all_gather", 800, 8) == sent_bytes("reduce_scatter", 800, 8) == 700
    assert (sent_bytes("send", 800, 8), sent_bytes("recv", 800, 8), sent_bytes("barrier", 0, 8)) == (
        800,
        0,
        0,
    )


def test_amounts_of_equal_transfers_are_added_and_empty_ones_left_out() -> None:
    a, b = Transfer("data", "all_reduce"), Transfer("tensor", "all_reduce")
    assert add_up([(a, Amount(1, 2)), (b, Amount(0, 0)), (a, Amount(3, 4))]) == {a: Amount(4, 6)}


def test_the_busiest_stage_and_its_groups() -> None:
    config = config_of("parallel.pipeline=4", "model.tie_embeddings=true", "world_size=8")
    grid = Grid(2, 1, 4)
    totals = {
        s: sum(rank_sent_bytes(rank_traffic(RankView.of(config, VOCABULARY, 2, s)), grid).values())
        for s in (0, 2, 3)
    }
    assert totals[busiest_stage(config, VOCABULARY, grid)] == max(totals.values()) > min(totals.values())
    assert grid.group_sizes["embedding"] == 2
    middle = rank_traffic(RankView.of(config, VOCABULARY, 2, 1))
    assert not any(transfer.group == "embedding" for transfer in middle)

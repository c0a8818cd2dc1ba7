"""What a rank sends in one training step, from shapes alone: calls and bytes by group and collective. Pure.

The data-parallel group is in plan/zero_communication.py. Every collective of a step is predicted, small ones
too; tests/ranks/test_communication.py holds the figures against what real steps send. A step after the first:
DeepSpeed's stage 3 gathers more in its first, while it finds out in which order modules run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from distllm.config.schema import Config
from distllm.layout.grid import Grid
from distllm.layout.parameter import WORD_EMBEDDINGS
from distllm.layout.traffic import Amount, Traffic, Transfer, add_up, sent_bytes
from distllm.model.loss_chunks import chunks_of_tokens
from distllm.plan.activations import num_recomputed_layers
from distllm.plan.gradients import BYTES
from distllm.plan.rank_view import RankView
from distllm.plan.zero_communication import (
    data_parallel_traffic,
    norm_reductions,
    tied_gradient_traffic,
)

Part = tuple[Transfer, Amount]


def rank_traffic(view: RankView, has_weights: bool | None = None) -> dict[Transfer, Amount]:
    """Of any rank of a stage.

    has_weights: whether microbatches have weights of tokens; None means what the configuration makes of data.
    """
    sequences = view.config.sequences
    if has_weights is None:
        has_weights = sequences.packing == "best_fit" or sequences.document_mask
    parts = [
        *((transfer, amount * view.num_microbatches) for transfer, amount in _tensor(view)),
        *_pipeline(view),
        *_scalars(has_weights),
        *norm_reductions(view.config),
        *data_parallel_traffic(view),
        *_tied(view),
    ]
    sizes = view.grid.group_sizes
    return add_up((transfer, amount) for transfer, amount in parts if sizes[transfer.group] > 1)


def rank_sent_bytes(traffic: Traffic, grid: Grid) -> dict[str, float]:
    """What a rank puts on the wire, by group."""
    sizes, sent = grid.group_sizes, dict[str, float]()
    for (group, kind), amount in traffic.items():
        sent[group] = sent.get(group, 0.0) + sent_bytes(kind, amount.bytes, sizes[group])
    return sent


def busiest_stage(config: Config, vocab_size: int, grid: Grid) -> int:
    """The pipeline stage whose ranks send most; among the first, one in the middle and the last."""
    last = grid.pipeline - 1

    def sent(stage_index: int) -> float:
        traffic = rank_traffic(RankView(config, vocab_size, grid, stage_index))
        return sum(rank_sent_bytes(traffic, grid).values())

    return max(sorted({0, (last + 1) // 2, last}), key=sent)


def _tensor(view: RankView) -> Iterator[Part]:
    """The tensor-parallel group, for one microbatch.

    Without sequence parallelism each layer reduces its activations after both blocks on the way forward and
    their gradients on the way back: "4 total communication operations" (Shoeybi et al. 2019,
    arXiv:1909.08053, section 3). With it each of the four becomes an all-gather and a reduce-scatter of the
    same size, and the column-parallel projections gather their inputs once more for the gradients of their
    weights (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2 and appendix B). A layer that is
    recomputed repeats its way forward.
    """
    model, stage = view.config.model, view.stage
    element, tokens = BYTES[view.config.train.precision], view.tokens_per_microbatch
    activation = tokens * model.hidden_size * element
    layers, recomputed = len(stage.layers), num_recomputed_layers(view.config, stage)
    if view.config.parallel.sequence:
        gathers = layers * 6 + recomputed * 2 + stage.is_first + stage.is_last
        yield _call("tensor", "all_gather", activation, gathers)
        scatters = layers * 4 + recomputed * 2 + stage.is_last
        # With learned positions Megatron reduces the whole embedding and cuts the sequence afterwards
        # (`reduce_scatter_embeddings` in models/common/embeddings/language_model_embedding.py).
        learned = model.position_embedding == "learned"
        scatters += stage.is_first and not learned
        yield _call("tensor", "reduce_scatter", activation, scatters)
        yield _call("tensor", "all_reduce", activation, stage.is_first and learned)
        yield _call("tensor", "all_reduce", model.hidden_size * element, _num_summed_vectors(view))
    else:
        reductions = layers * 4 + recomputed * 2 + stage.is_first + stage.is_last
        yield _call("tensor", "all_reduce", activation, reductions)
    if stage.is_last:
        # model/loss.py: for each chunk of tokens the largest logit, then two sums per token, in fp32.
        num_chunks = chunks_of_tokens(tokens, view.padded_vocab_size // view.grid.tensor)
        total = 3 * tokens * BYTES["fp32"]
        yield Transfer("tensor", "all_reduce"), Amount(2 * num_chunks, total)


def _num_summed_vectors(view: RankView) -> int:
    """Vectors that all tensor ranks apply to their parts of the sequence, whose gradients are summed
    (model/norm.py): of norms, and biases of the projections into the residual stream."""
    return sum(entry.kind == "vector" and entry.cut_dim is None for entry in view.table.values())


def _pipeline(view: RankView) -> Iterator[Part]:
    """Activations to the next chunk and gradients to the one before, for each microbatch (Narayanan et al.
    2021, arXiv:2104.04473, section 4.1: b * s * h; a t-th of it under sequence parallelism), and the loss.

    Between two stages Megatron Core sends what goes from the second to the first through the world group, so
    that both ways overlap (`_p2p_ops` in pipeline_parallel/p2p_communication.py).
    """
    config, parallel, stage_index = view.config, view.config.parallel, view.stage_index
    if parallel.pipeline == 1:
        return
    message = view.tokens_per_microbatch * config.model.hidden_size * BYTES[config.train.precision]
    message //= parallel.tensor if parallel.sequence else 1
    chunks = parallel.virtual_pipeline
    # Of the chunks of this stage: those with one after them, and those with one before them.
    followed = chunks - (stage_index == parallel.pipeline - 1)
    preceded = chunks - (stage_index == 0)
    calls = view.num_microbatches * (followed + preceded)
    mine, theirs = "pipeline", "pipeline"
    if parallel.pipeline == 2:
        mine, theirs = ("pipeline", "world") if stage_index == 0 else ("world", "pipeline")
    yield _call(mine, "send", message, calls)
    yield _call(theirs, "recv", message, calls)
    yield _call("pipeline", "broadcast", BYTES["fp32"], 1)  # the loss: engine/pipeline.py


def _scalars(has_weights: bool) -> Iterator[Part]:
    """Loss and the wish to stop (`Engine._combine`); the sum of token weights (engine/objective.py)."""
    yield _call("data", "all_reduce", 2 * BYTES["fp32"], 1)
    yield _call("model", "all_reduce", BYTES["fp32"], 1)
    yield _call("data", "all_reduce", 8, int(has_weights))  # in fp64


def _tied(view: RankView) -> Iterator[Part]:
    """The two copies of a tied embedding on the first and the last stage add up their gradients."""
    if not view.config.model.tie_embeddings or view.grid.pipeline == 1:
        return
    if view.stage.is_first or view.stage.is_last:
        table = math.prod(view.held.shapes[WORD_EMBEDDINGS])
        yield from tied_gradient_traffic(view.config, table, view.dp_size)


def _call(group: str, kind: str, message: int, calls: int) -> Part:
    return Transfer(group, kind), Amount(int(calls), int(calls) * message)

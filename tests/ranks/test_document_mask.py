"""Documents in one sequence are trained as if each were alone, and weights count alike under every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jobs
import pytest
import torch
from by_day import DAY_AND_NIGHT
from harness import run_ranks
from torch import Tensor

from distllm.config.schema import Config
from distllm.engine.engine import Engine
from distllm.engine.microbatch import Microbatch
from distllm.layout.groups import Groups

LLAMA = ("model=tiny",)
GPT2 = (
    "model=gpt2_124m",
    "model.num_layers=3",
    "model.hidden_size=48",
    "model.ffn_hidden_size=192",
    "model.num_attention_heads=4",
    "model.num_query_groups=4",
    "model.seq_length=32",
)
TIED = "model.tie_embeddings=true"
SEQ = 32
STEPS = 4
# Where documents begin in each sequence, again and again: one of length 1 in front, in between and at the
# end; a whole sequence.
STARTS_IN_SEQUENCES = [[0, 1, 12, 13, 30], [0], [0, 20], [0, 5, 10, 15, 20, 25, 31]]


def document_starts(sequences: list[int]) -> Tensor:
    """[num_documents + 1] of a microbatch of sequences, by their numbers in the global batch."""
    starts = [
        row * SEQ + start
        for row, sequence in enumerate(sequences)
        for start in STARTS_IN_SEQUENCES[sequence % len(STARTS_IN_SEQUENCES)]
    ]
    return torch.tensor([*starts, len(sequences) * SEQ], dtype=torch.int32)


def label_weights(sequences: list[int]) -> Tensor:
    """[len(sequences), SEQ]: 0 where the label is the next document's; in later sequences more."""
    weights = torch.stack(
        [torch.rand(SEQ, generator=torch.Generator().manual_seed(s)) * (1 + s / 4) for s in sequences]
    )
    weights.view(-1)[document_starts(sequences)[1:].long() - 1] = 0
    return weights


def packed_batch(step: int, config: Config) -> list[Microbatch]:
    """The microbatches of a global batch of packed documents, whose weights are far from even."""
    size = config.train.micro_batch_size
    batch = jobs.global_batch(step, config)
    weights = label_weights(list(range(len(batch))))
    weights[2:4] *= 1e-3  # a microbatch that hardly counts
    weights[6:8] = 0  # and one that does not
    parts = zip(batch.split(size), weights.split(size), range(0, len(batch), size), strict=True)
    return [
        Microbatch(tokens, weight, document_starts(list(range(first, first + size))))
        for tokens, weight, first in parts
    ]


def packed_microbatches(step: int, config: Config, groups: Groups) -> list[Microbatch]:
    """This rank's part of it."""
    return packed_batch(step, config)[groups.coordinates.data :: groups.grid.data]


def perturb(engine: Engine) -> None:
    """Away from the initial point, where norms are all 1 and errors in them would not show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in engine.places:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


class Alone:
    """One process; what it gives for packed sequences and for documents on their own."""

    def __init__(self, overrides: tuple[str, ...]) -> None:
        config = jobs.make_config(
            *overrides, "zero.stage=0", "train.global_batch_size=4", "train.micro_batch_size=4"
        )
        self.engine = jobs.build_engine(config)
        perturb(self.engine)
        self.tokens = jobs.global_batch(0, config)  # [4, SEQ + 1]
        self.sequences = list(range(4))
        self.weights = label_weights(self.sequences)
        self.starts = document_starts(self.sequences)

    def packed(self, starts: Tensor | None, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses, [4 * SEQ], and gradients of their weighted sum."""
        (chunk,) = self.engine.chunks
        inputs, labels = self.tokens[:, :-1], self.tokens[:, 1:]
        with torch.no_grad():
            losses = chunk(inputs, positions, starts, labels=labels)
        chunk(inputs, positions, starts, labels=labels, loss_mask=self.weights).backward()
        return losses.flatten(), jobs.take_gradients(self.engine)

    def one_by_one(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, each document a batch of its own."""
        (chunk,) = self.engine.chunks
        flat = [x.flatten() for x in (self.tokens[:, :-1], self.tokens[:, 1:], self.weights)]
        documents = zip(*(x.split(self.starts.diff().tolist()) for x in flat), strict=True)
        losses = []
        for inputs, labels, weights in documents:
            arguments = (inputs[None], torch.arange(len(inputs))[None], None)
            with torch.no_grad():
                losses.append(chunk(*arguments, labels=labels[None])[0])
            chunk(*arguments, labels=labels[None], loss_mask=weights[None]).backward()
        return torch.cat(losses), jobs.take_gradients(self.engine)

    def logits(self) -> tuple[Tensor, Tensor]:
        """[4 * SEQ, vocab] of packed sequences and of documents one by one."""
        inputs = self.tokens[:, :-1].contiguous()
        packed = self.engine.logits(inputs, jobs.VOCAB_SIZE, self.starts).flatten(0, 1)
        documents = inputs.flatten().split(self.starts.diff().tolist())
        return packed, torch.cat([self.engine.logits(d[None], jobs.VOCAB_SIZE)[0] for d in documents])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def packed_equals_alone(rank: int, overrides: tuple[str, ...]) -> None:
    """fp32, sums in another order: 1e-6 of a dot product, some 1e-5 after a few layers and their backward."""
    alone = Alone(overrides)
    positions = Microbatch(alone.tokens, alone.weights, alone.starts).positions
    from_sequence_start = Microbatch(alone.tokens).positions
    expected_losses, expected = alone.one_by_one()
    packed_logits, expected_logits = alone.logits()
    torch.testing.assert_close(packed_logits, expected_logits, rtol=1e-5, atol=2e-5)

    losses, gradients = alone.packed(alone.starts, positions)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=2e-5)
    errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) < 2e-5, errors

    # Without the mask both are far off: 1000 times the tolerance.
    losses, gradients = alone.packed(None, positions)
    assert relative_error(losses, expected_losses) > 2e-2
    assert max(relative_error(gradients[name], expected[name]) for name in expected) > 2e-2

    # Positions matter where they are learned; a rotation goes by their differences.
    losses, gradients = alone.packed(alone.starts, from_sequence_start)
    error = max(relative_error(gradients[name], expected[name]) for name in expected)
    assert (error > 2e-2) == ("embedding.position_embeddings.weight" in expected)


@pytest.mark.parametrize("shape", [LLAMA, (*LLAMA, TIED), GPT2], ids=["llama", "llama, tied", "gpt2"])
def test_packed_documents_are_trained_as_if_alone(shape: tuple[str, ...]) -> None:
    run_ranks(1, packed_equals_alone, shape)


@dataclass(frozen=True)
class Outcome:
    """trace: of training. sums: [sum of losses, sum of weights] of a validation.
    logits: [2, SEQ - 1, vocab] of packed documents."""

    trace: jobs.Trace
    sums: Tensor
    logits: Tensor


def outcomes(rank: int, cases: list[tuple[str, ...]]) -> list[Outcome]:
    results = []
    for overrides in cases:
        config = jobs.make_config(*overrides)
        engine = jobs.build_engine(config)
        trace = jobs.train(engine, config, STEPS, batch_of=packed_microbatches)
        # One microbatch, of the first data-parallel rank; an interleaved schedule needs more and makes them.
        first = packed_microbatches(STEPS, config, engine.groups)[0]
        if engine.groups.coordinates.data > 0:
            first = replace(first, loss_weights=torch.zeros_like(first.labels))
        sums = engine.evaluate([first])
        # 31 tokens are no multiple of the tensor-parallel degree: each sequence is padded.
        tokens = jobs.global_batch(STEPS, config)[:2, : SEQ - 1].contiguous()
        starts = torch.tensor([0, 1, 12, 31, 50, 62], dtype=torch.int32)
        results.append(Outcome(trace, sums, engine.logits(tokens, jobs.VOCAB_SIZE, starts)))
        jobs.finish(engine)
    return results


@pytest.fixture(scope="module")
def single_process() -> dict[tuple[str, ...], Outcome]:
    models = [(), (TIED,), GPT2]
    found = run_ranks(1, outcomes, [("zero.stage=0", *model) for model in models])[0]
    return dict(zip(models, found, strict=True))


PP2_INTERLEAVED = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
TP2_SP = ("parallel.tensor=2", "parallel.sequence=true")
# By number of ranks: layout, and model as in `single_process`. Every stage and way to recompute has its turn.
CASES: dict[int, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {
    2: [
        *(((f"zero.stage={stage}",), ()) for stage in range(4)),
        (("zero.stage=0", *TP2_SP), ()),
        (("zero.stage=1", *TP2_SP, "recompute=full"), GPT2),
        (("zero.stage=2", *TP2_SP, "recompute=selective"), (TIED,)),
        (("zero.stage=1", "parallel.pipeline=2"), (TIED,)),
        (("zero.stage=0", "parallel.pipeline=2", "recompute=full"), (TIED,)),
        (("zero.stage=2", "parallel.pipeline=2", "recompute=full", "recompute.num_layers=1"), ()),
        (("zero.stage=3", *PP2_INTERLEAVED), ()),
        (("zero.stage=0", *PP2_INTERLEAVED, "recompute=selective"), (TIED,)),
    ],
    4: [
        (("zero.stage=3", "parallel.tensor=2"), ()),
        (("zero.stage=2", *TP2_SP, "recompute=full"), (TIED,)),
        (("zero.stage=0", "parallel.pipeline=2"), (TIED,)),
        (("zero.stage=1", *PP2_INTERLEAVED, "recompute=selective"), ()),
        (("zero.stage=2", "parallel.pipeline=2", "zero.offload_optimizer=true"), (TIED,)),
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("world_size", CASES)
@pytest.mark.parametrize("part", DAY_AND_NIGHT)
def test_every_layout_trains_alike(
    part: int, world_size: int, single_process: dict[tuple[str, ...], Outcome]
) -> None:
    """Tolerances of losses, gradients and weights: see jobs.assert_traces_equal. Validation and logits come
    after the updates, from weights that are up to 1e-5 off."""
    chosen = CASES[world_size][part::2]
    cases = [(*layout, *model) for layout, model in chosen]
    for outcomes_of_rank in run_ranks(world_size, outcomes, cases, deadline_seconds=240):
        for (layout, model), outcome in zip(chosen, outcomes_of_rank, strict=True):
            expected, what = single_process[model], f"{world_size} ranks, {' '.join(layout)}"
            jobs.assert_traces_equal(outcome.trace, expected.trace, what)
            torch.testing.assert_close(outcome.sums, expected.sums, rtol=1e-5, atol=0)
            torch.testing.assert_close(outcome.logits, expected.logits, rtol=1e-4, atol=1e-4)


def check_weighted_mean(rank: int) -> None:
    """A step's loss and gradients, against their definition over the global batch."""
    config = jobs.make_config("zero.stage=0")
    engine = jobs.build_engine(config)
    (chunk,) = engine.chunks
    batch = packed_batch(0, config)
    total = torch.stack([weights_of(microbatch) for microbatch in batch]).sum()
    loss = torch.tensor(0.0)
    for microbatch in batch:
        assert microbatch.loss_weights is not None
        part = chunk(
            microbatch.inputs,
            microbatch.positions,
            microbatch.document_starts,
            labels=microbatch.labels,
            loss_mask=microbatch.loss_weights / total,
        )
        part.backward()
        loss += part.detach()
    expected = jobs.take_gradients(engine)

    trace = jobs.train(engine, config, 1, batch_of=packed_microbatches)
    assert trace.losses == pytest.approx([loss.item()], rel=1e-6)
    for name, gradient in expected.items():
        assert relative_error(trace.gradients[name].flatten(), gradient.flatten()) < 1e-5, name
    jobs.finish(engine)


def test_the_loss_is_the_weighted_mean_over_the_global_batch() -> None:
    run_ranks(2, check_weighted_mean)


def weigh_all(weight: float | None) -> Callable[[int, Config, Groups], list[Microbatch]]:
    """Microbatches whose labels all have this weight."""

    def microbatches(step: int, config: Config, groups: Groups) -> list[Microbatch]:
        batch = jobs.microbatches(step, config, groups)
        if weight is None:
            return batch
        return [replace(m, loss_weights=torch.full(m.labels.shape, weight)) for m in batch]

    return microbatches


def check_even_weights(rank: int) -> None:
    traces = []
    for weight in (None, 1.0, 7.0):
        config = jobs.make_config("zero.stage=1")
        engine = jobs.build_engine(config)
        traces.append(jobs.train(engine, config, STEPS, batch_of=weigh_all(weight)))
        jobs.finish(engine)
    for trace in traces[1:]:
        jobs.assert_traces_equal(trace, traces[0], "even weights")


def test_even_weights_are_no_weights() -> None:
    run_ranks(2, check_even_weights)


def check_no_weight(rank: int) -> None:
    for stage in range(4):
        config = jobs.make_config(f"zero.stage={stage}")
        engine = jobs.build_engine(config)
        result = engine.train_step(weigh_all(0.0)(0, config, engine.groups), config.optimizer.lr)
        assert (result.loss, result.grad_norm) == (0.0, 0.0)
        weights = jobs.gather_weights(engine)
        assert all(torch.isfinite(w).all() for w in weights.values())
        jobs.finish(engine)


def test_a_step_without_any_weight_has_loss_and_gradients_of_zero() -> None:
    run_ranks(2, check_no_weight)


def check_missing_weights(rank: int) -> None:
    config = jobs.make_config("zero.stage=0")
    engine = jobs.build_engine(config)
    first, *others = packed_batch(0, config)
    with pytest.raises(AssertionError, match="only some microbatches have weights"):
        engine.train_step([replace(first, loss_weights=None), *others], config.optimizer.lr)
    jobs.finish(engine)


def test_weights_of_some_microbatches_only_are_refused() -> None:
    run_ranks(1, check_missing_weights)


def weights_of(microbatch: Microbatch) -> Tensor:
    assert microbatch.loss_weights is not None
    return microbatch.loss_weights.sum()

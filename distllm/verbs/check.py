"""`distllm check [overrides] world_size=N`: is this job legal on N ranks, and what will each of them need?

Neither torch nor a GPU nor the data is needed; the rules are those of `train`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NoReturn

from distllm.config.compose import Request
from distllm.config.layout_rules import num_microbatches
from distllm.config.problems import Problem, UserError
from distllm.config.rules import NUM_BYTES
from distllm.config.schema import Config, Tokenizer
from distllm.config.stages import pipeline_stages
from distllm.layout.grid import Grid
from distllm.layout.traffic import sent_bytes
from distllm.metrics.format import block, bytes_, count, plural, table
from distllm.metrics.summary import batch_arithmetic
from distllm.model.parameters import count_parameters
from distllm.plan.activations import microbatches_in_flight
from distllm.plan.bubble import bubble_of_ideal_time, bubble_of_step
from distllm.plan.communication import busiest_stage, rank_traffic
from distllm.plan.fit import DeviceLimit, limit_of, misfit
from distllm.plan.memory import estimate_memory, rank_memory
from distllm.plan.nearest import Proposal, nearest_layouts
from distllm.plan.rank_view import RankView

NOT_COUNTED = "without communication buffers, layers that ZeRO-3 gathers, fragmentation and libraries"
# Of these context and communicators are estimates (plan/libraries.py).
NOT_COUNTED_ON_A_DEVICE = "context and communicators estimated, without temporary tensors and fragmentation"
GIB = 2**30


def run(config: Config, request: Request) -> int:
    """Print what a legal job comes to."""
    print(report(config, vocabulary_size(config.tokenizer), request.world_size))
    return 0


def refuse(refusal: UserError, request: Request) -> NoReturn:
    """Raise it again with the nearest legal layouts."""
    advice = _advice(refusal.config, request.world_size) if refusal.config else ""
    raise UserError(refusal.problems, advice=advice) from None


def fits_the_device(config: Config, world_size: int) -> Iterator[Problem]:
    """Compare a legal job with the device of its cluster: the rule of `check`."""
    yield from _misfits(config, world_size, "world_size={}")


def fits_the_device_when_started(config: Config, world_size: int) -> Iterator[Problem]:
    """Compare a legal job with the device of its cluster: the rule of `train`."""
    yield from _misfits(config, world_size, "on {} processes")


def _misfits(config: Config, world_size: int, more_ranks: str) -> Iterator[Problem]:
    if config.cluster.memory_bytes is not None:
        problem = misfit(config, vocabulary_size(config.tokenizer), world_size, more_ranks)
        yield from [problem] if problem else []


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Tokens in all, without training a tokenizer. User errors: a finished tokenizer that `train` refuses."""
    if tokenizer.path is not None:
        from distllm.data.preparation.prepare_tokenizer import check_finished
        from distllm.data.tokenizer import TextTokenizer

        folder = Path(tokenizer.path).expanduser()
        finished = TextTokenizer.load(folder, tokenizer.end_of_document)
        check_finished(finished, tokenizer)
        return finished.vocab_size
    return tokenizer.vocab_size or NUM_BYTES + 1 + len(tokenizer.special_tokens)


def report(config: Config, vocab_size: int, world_size: int) -> str:
    """All that follows from a legal layout."""
    grid = Grid.of(config.parallel, world_size)
    microbatches = num_microbatches(config, world_size)
    assert microbatches is not None, "the batch of a legal job is shared out"
    train = config.train
    sections = {
        "model": _model(config, vocab_size),
        "layout": _layout(config, grid),
        "stages": _stages(config),
        "batch": batch_arithmetic(
            train.global_batch_size, train.micro_batch_size, grid.data, config.model.seq_length
        ),
        "bubble": _bubble(config, microbatches),
        "memory": _memory(config, vocab_size, grid, microbatches),
        "sent": _sent(config, vocab_size, grid),
    }
    return block("distllm check: legal", sections)


def _model(config: Config, vocab_size: int) -> str:
    model = config.model
    padded = model.padded_vocab_size(vocab_size)
    padding = f", padded to {padded:,}" if padded > vocab_size else ""
    parameters = count(count_parameters(model, vocab_size).total)
    return f"{model.name}: {parameters} parameters, vocabulary {vocab_size:,}{padding}"


def _layout(config: Config, grid: Grid) -> str:
    sequence = ", sequence parallel" if config.parallel.sequence else ""
    first, *others = grid.described.items()  # what is left of the world comes last here
    degrees = " x ".join(f"{axis} {degree}" for axis, degree in (*others, first))
    return (
        f"{plural(grid.world_size, 'rank')} = {degrees}{sequence}\n"
        f"ZeRO stage {config.zero.stage}, {config.train.precision}, "
        f"gradients in {config.train.gradient_accumulation}\n{grid}"
    )


def _stages(config: Config) -> str:
    """Layers of each stage, stages alike on one line."""
    stages = pipeline_stages(config.model.num_layers, config.parallel)
    lines = {}
    for sizes, alike in groupby(enumerate(stages), lambda numbered: [len(c) for c in numbered[1].chunks]):
        numbers = [number for number, _ in alike]
        name = f"stage {numbers[0]}" if len(numbers) == 1 else f"stages {numbers[0]} to {numbers[-1]}"
        chunks = f" in {len(sizes)} chunks: {', '.join(map(str, sizes))}" if len(sizes) > 1 else ""
        lines[name] = f"{plural(sum(sizes), 'layer')}{' each' if len(numbers) > 1 else ''}{chunks}"
    return table(lines)


def _bubble(config: Config, microbatches: int) -> str:
    sizes = config.parallel.pipeline, config.parallel.virtual_pipeline, microbatches
    if config.parallel.pipeline == 1:
        return ""
    schedule = "1F1B" if config.parallel.virtual_pipeline == 1 else "interleaved 1F1B"
    return (
        f"{bubble_of_step(*sizes):.2%} of each step is waiting, "
        f"{bubble_of_ideal_time(*sizes):.2%} on top of the ideal time ({schedule})"
    )


def _memory(config: Config, vocab_size: int, grid: Grid, microbatches: int) -> str:
    """Bytes per rank of the first, a middle and the last stage."""
    last = config.parallel.pipeline - 1
    rows: dict[str, list[str]] = {"": []}
    for stage in sorted({0, (last + 1) // 2, last}):
        memory = rank_memory(RankView(config, vocab_size, grid, stage))
        in_flight = microbatches_in_flight(config, stage, microbatches)
        rows[""].append(f"stage {stage}")
        for kind, size in memory.on_device.items():
            rows.setdefault(kind, []).append(bytes_(size))
        rows.setdefault("total on the device", []).append(bytes_(memory.total))
        if memory.host:
            rows.setdefault("in host memory", []).append(bytes_(memory.host))
        rows.setdefault("microbatches in flight", []).append(f"{in_flight:g}")
    width = max(len(cell) for cells in rows.values() for cell in cells)
    lines = {name: "  ".join(cell.rjust(width) for cell in cells) for name, cells in rows.items()}
    heading = f"per rank, {NOT_COUNTED}"
    if config.cluster.device:
        heading = f"per rank on {config.cluster.device}, {NOT_COUNTED_ON_A_DEVICE}"
    return "\n".join([heading, table(lines), *_fits(config, vocab_size, grid)])


def _fits(config: Config, vocab_size: int, grid: Grid) -> list[str]:
    """A line on the room that a legal job leaves on the device."""
    size = config.cluster.memory_bytes
    if size is None:
        return []
    needed = sum(estimate_memory(config, vocab_size, grid).values())
    return [f"fits: {needed / GIB:.1f} of {size / GIB:.1f} GiB on the fullest rank"]


def _sent(config: Config, vocab_size: int, grid: Grid) -> str:
    """What the rank that sends most puts on the wire in a step, one group a line."""
    stage = busiest_stage(config, vocab_size, grid)
    traffic = rank_traffic(RankView(config, vocab_size, grid, stage))
    if not traffic:
        return ""
    sizes, lines, total = grid.group_sizes, dict[str, str](), 0.0
    for group, kinds in groupby(sorted(traffic), lambda transfer: transfer.group):
        texts = []
        for transfer in kinds:
            amount = traffic[transfer]
            sent = sent_bytes(transfer.kind, amount.bytes, sizes[group])
            total += sent
            if transfer.kind != "recv":  # what another rank sends
                texts.append(f"{transfer.kind} {bytes_(round(sent))} ({amount.calls:,})")
        if texts:
            lines[group] = ", ".join(texts)
    where = f" of stage {stage}, which sends most," if config.parallel.pipeline > 1 else ""
    return f"{bytes_(round(total))} by each rank{where} in a step (calls)\n{table(lines)}"


def _advice(config: Config, world_size: int) -> str:
    """The nearest legal layouts, each as it is typed; nothing where the layout is not what is refused."""
    lines = []
    limit = _limit(config)
    for i, proposal in enumerate(nearest_layouts(config, world_size, limit=limit), 1):
        lines.append(f"  {i}. {' '.join(proposal.overrides)}")
        lines.append(f"     distance {proposal.distance:.1f}{_need(proposal, world_size)}")
    that_fit = " that fit" if limit else ""
    how = "distance: doublings and halvings, and 0.5 for each changed setting"
    heading = f"nearest legal layouts{that_fit} ({how}):"
    return "\n".join([heading, *lines]) if lines else ""


def _limit(config: Config) -> DeviceLimit | None:
    try:
        return limit_of(config, vocabulary_size(config.tokenizer))
    except UserError:  # one of the problems already
        return None


def _need(proposal: Proposal, world_size: int) -> str:
    config = proposal.config
    try:
        vocab_size = vocabulary_size(config.tokenizer)
    except UserError:  # one of the problems already
        return ""
    total = sum(estimate_memory(config, vocab_size, Grid.of(config.parallel, world_size)).values())
    return f"; {bytes_(total)} on the fullest rank"

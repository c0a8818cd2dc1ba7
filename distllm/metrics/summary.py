"""The text blocks before and after a run: what will run and why, and the result. Pure, at most 100 wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distllm.metrics.format import INDENT, WIDTH, block, bytes_, count, duration, plural, rate, table

SAMPLE_LINES = 20

ZERO_STAGES = (
    "nothing",
    "optimizer states",
    "optimizer states and gradients",
    "optimizer states, gradients and parameters",
)


@dataclass(frozen=True)
class StartFacts:
    """The facts known when training starts.

    grid: the layout, drawn; may have several lines.
    precision: as `train.precision`.
    num_parameters: of the whole model, shared ones once.
    steps: updates in all; resume_step: those done already.
    training_tokens: in the training split, once through.
    source_epochs: of each source of a mixture, its fraction of all samples and how often they go through it.
    memory_bytes_per_rank: estimate, item by item, for the rank that needs most.
    resumed_from: the checkpoint, None for a start from scratch.
    """

    run_dir: Path
    model_name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    seq_length: int
    num_parameters: int
    precision: str
    zero_stage: int
    grid: str
    data_parallel: int
    global_batch_size: int
    micro_batch_size: int
    steps: int
    resume_step: int
    training_tokens: int
    source_epochs: Mapping[str, tuple[float, float]]
    memory_bytes_per_rank: Mapping[str, int]
    resumed_from: Path | None


@dataclass(frozen=True)
class EndFacts:
    """The facts known when training ends.

    loss: training, at the last step; validation_loss: both nats per token. None where not measured.
    gzip_bits_per_byte: `gzip -9` on the text of the validation.
    seconds: of this process.
    tokens_per_second: mean over these seconds.
    goodput: the account of all of the run's time.
    files: the paths of results, by name.
    sample: generated text.
    """

    step: int
    steps: int
    seconds: float
    tokens_per_second: float
    loss: float | None
    validation_loss: float | None
    validation_bits_per_byte: float | None
    gzip_bits_per_byte: float | None
    goodput: str
    files: Mapping[str, Path]
    sample: str | None


def start_summary(facts: StartFacts) -> str:
    """Describe what will run, with the arithmetic behind it."""
    sections = {
        "model": _model(facts),
        "precision": facts.precision,
        "ZeRO": _zero(facts),
        "layout": facts.grid,
        "batch": batch_arithmetic(
            facts.global_batch_size, facts.micro_batch_size, facts.data_parallel, facts.seq_length
        ),
        "training": _training(facts),
        "memory": "estimate for the rank that needs most\n" + _memory(facts.memory_bytes_per_rank),
        "run": f"{facts.run_dir}\n" + _resume(facts),
    }
    return block("distllm: training starts", sections)


def end_summary(facts: EndFacts) -> str:
    """Describe the result of the run and where its files are."""
    speed = f"in {duration(facts.seconds)}, {rate(facts.tokens_per_second)}"
    sections = {
        "steps": f"{facts.step:,} of {facts.steps:,} {speed}",
        "loss": _losses(facts),
        "text": _compression(facts),
        "time": facts.goodput,
        "files": table({name: str(path) for name, path in facts.files.items()}),
        "sample": _sample(facts.sample) if facts.sample else "",
    }
    outcome = "training is complete" if facts.step >= facts.steps else "training has stopped"
    return block(f"distllm: {outcome}", sections)


def _model(facts: StartFacts) -> str:
    heads = f"{facts.num_attention_heads} heads"
    if facts.num_query_groups != facts.num_attention_heads:
        heads += f" in {facts.num_query_groups} query groups"
    return (
        f"{facts.model_name}: {count(facts.num_parameters)} parameters\n"
        f"{facts.num_layers} layers x {facts.hidden_size:,} hidden, {heads}, "
        f"feed-forward {facts.ffn_hidden_size:,}, vocabulary {facts.vocab_size:,}"
    )


def _zero(facts: StartFacts) -> str:
    ranks = plural(facts.data_parallel, "data-parallel rank")
    return f"stage {facts.zero_stage}: {ZERO_STAGES[facts.zero_stage]} split over {ranks}"


def batch_arithmetic(
    global_batch_size: int, micro_batch_size: int, data_parallel: int, seq_length: int
) -> str:
    """Explain how many sequences and tokens a step has."""
    sequences = plural(global_batch_size, "sequence")
    factors = (
        plural(global_batch_size // (micro_batch_size * data_parallel), "microbatch", "es"),
        plural(micro_batch_size, "sequence"),
        plural(data_parallel, "data-parallel rank"),
    )
    return (
        f"{sequences} a step = {' x '.join(factors)}\n"
        f"{global_batch_size * seq_length:,} tokens a step = {sequences} x {seq_length:,} tokens"
    )


def _training(facts: StartFacts) -> str:
    tokens = facts.steps * facts.global_batch_size * facts.seq_length
    text = f"{plural(facts.steps, 'step')} = {count(tokens)} tokens"
    if facts.training_tokens:
        epochs = tokens / facts.training_tokens
        text += f" = {epochs:.2f} epochs over {count(facts.training_tokens)} training tokens"
    lines = [text, f"{tokens / facts.num_parameters:.3g} tokens per parameter"]
    if len(facts.source_epochs) > 1:
        sources = {
            name: f"{share:7.2%} of the samples, {epochs:.2f} epochs"
            for name, (share, epochs) in facts.source_epochs.items()
        }
        lines.append(table(sources))
    return "\n".join(lines)


def _memory(items: Mapping[str, int]) -> str:
    return table({name: bytes_(size) for name, size in {**items, "total": sum(items.values())}.items()}, ">")


def _resume(facts: StartFacts) -> str:
    if facts.resumed_from is None:
        return "from scratch"
    return f"continues after step {facts.resume_step:,} of {facts.steps:,}, from {facts.resumed_from}"


def _losses(facts: EndFacts) -> str:
    losses = {"training": facts.loss, "validation": facts.validation_loss}
    return table({name: f"{loss:.3f} nats per token" for name, loss in losses.items() if loss is not None})


def _compression(facts: EndFacts) -> str:
    if facts.validation_bits_per_byte is None:
        return ""
    sizes = {"this model": f"{facts.validation_bits_per_byte:.3f} bits per byte"}
    if facts.gzip_bits_per_byte is None:
        return table(sizes)
    sizes["gzip -9"] = f"{facts.gzip_bits_per_byte:.3f} bits per byte"
    return table(sizes) + "\non the same validation text; lower is better"


def _sample(text: str) -> str:
    """Wrap the generated text. Control characters are escaped: a model may produce terminal commands."""
    printable = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text.expandtabs(4))
    lines: list[str] = []
    for line in printable.split("\n"):
        lines += textwrap.wrap(line, WIDTH - INDENT - 2, replace_whitespace=False, drop_whitespace=False) or [
            ""
        ]
    if len(lines) > SAMPLE_LINES:
        lines = [*lines[:SAMPLE_LINES], "..."]
    return "\n".join(f"| {line}" for line in lines)

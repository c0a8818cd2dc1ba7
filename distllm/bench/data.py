"""`distllm bench data`: prepare the job's documents afresh in bench.folder, and read them as training does.

In one process. It prepares all documents, with as many workers as `preparation` says; a tokenizer that the
job trains is trained first, and timed separately. It then reads steps of the job in training order, without
the device and without reading ahead, from files that are in the page cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from distllm.bench.report import Report, Spread
from distllm.config.schema import Config
from distllm.data.loader import StepShape
from distllm.data.preparation.prepare import prepare
from distllm.data.preparation.prepare_tokenizer import prepare_tokenizer
from distllm.data.prepared import PreparedData
from distllm.lineage.history import blends
from distllm.metrics.format import block, bytes_, rate
from distllm.trainer.open_data import OpenedData, open_data
from distllm.trainer.state import TrainState

READ_SECONDS = 1.0


@dataclass(frozen=True)
class DataSpeed:
    """The measured speeds.

    num_bytes: of text; None where the source is token files of another tool, which are not prepared.
    tokenizer_seconds: to train it, or to find the finished one.
    open_seconds: until the first step is read.
    tokens_per_second: of one process that reads training sequences.
    """

    num_bytes: int | None
    num_tokens: int
    tokenizer_seconds: float
    prepare_seconds: float
    open_seconds: float
    tokens_per_second: Spread


def run(config: Config, vocab_size: int) -> Report:
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=config.bench.folder) as folder:
        speed = measure(replace(config, data=replace(config.data, cache=folder)))
    return Report(table(speed), asdict(speed))


def measure(config: Config) -> DataSpeed:
    """Measure preparation into the cache of `config`, which must be empty, and reading."""
    job = (config.data, config.preparation, config.tokenizer)
    tokenizer_seconds = seconds(lambda: prepare_tokenizer(*job, _silent))
    begin = time.perf_counter()
    prepared = prepare(*job, _silent)
    prepare_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    read = _reader(config, open_data(config, prepared, _silent))
    read(0)
    open_seconds = time.perf_counter() - begin
    tokens_per_step = config.train.global_batch_size * config.model.seq_length
    steps_per_second = [reading_rate(read, READ_SECONDS) for _ in range(config.bench.repeats)]
    splits = [split for source in prepared.sources.values() for split in (source.train, source.validation)]
    return DataSpeed(
        num_bytes=_text_bytes(prepared),
        num_tokens=sum(split.num_tokens for split in splits if split),
        tokenizer_seconds=tokenizer_seconds,
        prepare_seconds=prepare_seconds,
        open_seconds=open_seconds,
        tokens_per_second=Spread.of([rate * tokens_per_step for rate in steps_per_second]),
    )


def seconds(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


def reading_rate(read: Callable[[int], object], at_least_seconds: float) -> float:
    """Return calls of `read` per second; its argument is their number, from 0 on."""
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < at_least_seconds:
        read(done)
        done += 1
    return done / (time.perf_counter() - begin)


def _reader(config: Config, data: OpenedData) -> Callable[[int], object]:
    """Return a function that reads a step by number; it repeats after an epoch of the smallest source."""
    batch = config.train.global_batch_size
    state = TrainState().planned(batch, config.data.weights_at(0))
    shape = StepShape(batch, config.train.micro_batch_size, dp_size=1)
    smallest = min(source.sequences.num_sequences for source in data.training.sources.values())
    num_steps = max(1, smallest // batch)
    drawn = blends(state.history)
    return lambda number: data.training.microbatches(number % num_steps * batch, drawn, 0, shape)


def _text_bytes(prepared: PreparedData) -> int | None:
    sizes = [
        split.num_bytes
        for source in prepared.sources.values()
        for split in (source.train, source.validation)
        if split
    ]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _silent(_: str) -> None:
    pass


def table(speed: DataSpeed) -> str:
    text = ""
    if speed.num_bytes is not None:
        text = f"{bytes_(speed.num_bytes)} of text, {speed.num_bytes / speed.prepare_seconds / 1e6:.1f} MB/s"
    spread = speed.tokens_per_second
    return block(
        "distllm bench data",
        {
            "tokenizer": f"{speed.tokenizer_seconds:.2f} s",
            "prepare": f"{speed.prepare_seconds:.2f} s: {speed.num_tokens:,} tokens {text}".rstrip(),
            "open": f"{speed.open_seconds:.3f} s until the first step is read",
            "read": f"{rate(spread.median)}, median of {spread.count} ({rate(spread.least)} to "
            f"{rate(spread.most)})",
        },
    )

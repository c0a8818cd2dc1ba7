"""`distllm bench train`: whole steps of the job's own model, layout and engine, on random tokens.

    MFU = flops_per_token * tokens_per_second / (peak FLOP/s of a device * devices)

with flops_per_token = 6 * (parameters that multiply) + 12 * layers * heads * head_dim * seq_length, attention
not halved for the causal mask (distllm/model/size.py; PaLM, arXiv:2204.02311, appendix B), and the peak from
the maker's data sheet (distllm/runtime/devices.py). Where no peak is known there is no MFU. The fraction of
the measured peak is always reported: the same quotient with the speed of large matrix products on this
machine, measured in the same run by all ranks at a time.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

import torch.distributed as dist

from distllm.bench.engine import LEARNING_RATE, World, world
from distllm.bench.report import Report, Spread, device_name
from distllm.bench.timing import PeakMemory, measured_peak_flops, over_ranks, repeated_seconds
from distllm.config.schema import Config
from distllm.engine.phases import Timings
from distllm.metrics.format import block, bytes_, count, plural, rate
from distllm.model.parameters import count_parameters, flops_per_token
from distllm.runtime.devices import peak_flops


@dataclass(frozen=True)
class TrainSpeed:
    """Results of all ranks together; memory of the rank that needs most, beyond that before the model.

    phases: median seconds by phase, see distllm/engine/phases.py, on rank 0.
    measured_peak_flops: FLOP/s of large matrix products, of all ranks.
    start_loss, end_loss: of the first and the last step, nats per token.
    """

    num_parameters: int
    tokens_per_step: int
    step_seconds: Spread
    tokens_per_second: float
    flops_per_token: float
    mfu: float | None
    share_of_measured_peak: float
    measured_peak_flops: float
    peak_memory_bytes: int
    phases: dict[str, float]
    start_loss: float
    end_loss: float


def run(config: Config, vocab_size: int) -> Report:
    """Measure steps. Collective: on every rank of the job."""
    with world(config, vocab_size) as started:
        speed = measure(config, vocab_size, started)
    return Report(table(config, speed, started.runtime.world_size), asdict(speed))


def measure(config: Config, vocab_size: int, started: World) -> TrainSpeed:
    device, world_size = started.runtime.device, started.runtime.world_size
    memory = PeakMemory(device)
    engine = started.build(config)
    losses: list[float] = []
    timings: list[Timings] = []

    def step() -> None:
        losses.append(engine.train_step(started.microbatches, LEARNING_RATE).loss)
        timings.append(engine.phases.end_step())

    seconds = repeated_seconds(step, device, config.bench.warmup_steps, config.bench.steps)
    peak_memory = memory.extra_bytes()
    by_step = [step_timings.seconds() for step_timings in timings[-config.bench.steps :]]
    measured_peak = over_ranks(measured_peak_flops(device, config.train.precision), dist.ReduceOp.SUM)
    spread = Spread.of(seconds)
    tokens_per_step = config.train.global_batch_size * config.model.seq_length
    tokens_per_second = tokens_per_step / spread.median
    flops = flops_per_token(config.model, vocab_size)
    peak = peak_flops(device, config.train.precision)
    return TrainSpeed(
        num_parameters=count_parameters(config.model, vocab_size).total,
        tokens_per_step=tokens_per_step,
        step_seconds=spread,
        tokens_per_second=tokens_per_second,
        flops_per_token=flops,
        mfu=flops * tokens_per_second / (peak * world_size) if peak else None,
        share_of_measured_peak=flops * tokens_per_second / measured_peak,
        measured_peak_flops=measured_peak,
        peak_memory_bytes=int(over_ranks(peak_memory, dist.ReduceOp.MAX)),
        phases={name: statistics.median(step[name] for step in by_step) for name in by_step[0]},
        start_loss=losses[0],
        end_loss=losses[-1],
    )


def table(config: Config, speed: TrainSpeed, world_size: int) -> str:
    model, train, seconds = config.model, config.train, speed.step_seconds
    mfu = f"{speed.mfu:.1%}" if speed.mfu is not None else "unknown: the peak of this device is not known"
    phases = [f"{name.replace('_', ' ')} {median:.4g} s" for name, median in speed.phases.items()]
    return block(
        f"distllm bench train: {plural(world_size, 'rank')}, {device_name()}",
        {
            "model": f"{model.name}: {count(speed.num_parameters)} parameters, {model.seq_length} tokens a "
            f"sequence, {train.precision}",
            "batch": f"{train.global_batch_size} sequences, {speed.tokens_per_step:,} tokens a step, "
            f"{train.micro_batch_size} sequences a microbatch",
            "step": f"{seconds.median:.4g} s, median of {seconds.count} "
            f"({seconds.least:.4g} to {seconds.most:.4g})",
            "speed": rate(speed.tokens_per_second),
            "phases": ", ".join(phases),
            "MFU": mfu,
            "of products": f"{speed.share_of_measured_peak:.1%} of {speed.measured_peak_flops / 1e9:,.0f} "
            f"GFLOP/s of large {train.precision} matrix products here",
            "memory": f"{bytes_(speed.peak_memory_bytes)} at most on a rank for model, optimizer and steps",
            "loss": f"{speed.start_loss:.4f} at first, {speed.end_loss:.4f} at last",
        },
    )

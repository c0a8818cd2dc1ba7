"""Training speed of this machine: tokens/s, MFU and memory of whole steps on random tokens.

    python tests/bench/train.py [--json FILE] [--steps N] [--sizes 125m,760m,1b] [OVERRIDE ...]

One process on one device; under torchrun every rank takes part. MFU = flops_per_token x tokens/s / peak, with
flops_per_token as in distllm/model/size.py (attention not halved for the causal mask) and the peak by device
name from distllm/runtime/devices.py; unknown devices have no MFU. Times are CUDA events on a GPU, else the
wall clock; the median of N steps after 5 of warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distllm.runtime import quiet

WARM_UP_STEPS = 5
VOCAB_SIZE = 50_257
# Shapes of llm-foundry's MPT models, whose speeds are published: layers, hidden, heads.
SIZES = {"tiny": (4, 256, 4), "125m": (12, 768, 12), "760m": (24, 1536, 12), "1b": (24, 2048, 16)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured job. step_seconds: median, least and most. memory_bytes: peak allocated on the device."""

    size: str
    overrides: list[str]
    num_parameters: int
    seq_length: int
    tokens_per_step: int
    step_seconds: float
    step_seconds_min: float
    step_seconds_max: float
    tokens_per_second: float
    mfu: float | None
    memory_bytes: int | None
    loss: float


def measure(size: str, overrides: list[str], steps: int) -> Row:
    """Build the job, run it, tear it down."""
    import torch

    from distllm.config import compose
    from distllm.engine.create import create_engine
    from distllm.engine.pipeline import Microbatch
    from distllm.layout.grid import Grid
    from distllm.layout.groups import create_groups, destroy_groups
    from distllm.model.build import build_model
    from distllm.model.size import count_parameters, flops_per_token
    from distllm.runtime.devices import peak_flops

    config = compose.load(compose.parse("train", [*_shape(size), *overrides]))
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    world_size = torch.distributed.get_world_size()
    grid = Grid.from_world_size(world_size, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)
    groups = create_groups(grid, timedelta(minutes=5), config.parallel.virtual_pipeline)
    built = build_model(config, VOCAB_SIZE, groups, device)
    engine = create_engine(built.chunks, built.places, config, groups)
    batch, seq = config.train.global_batch_size // grid.data, config.model.seq_length
    tokens = torch.randint(0, VOCAB_SIZE, (batch, seq + 1), device=device)
    microbatches = [Microbatch(part) for part in tokens.split(config.train.micro_batch_size)]
    losses: list[float] = []

    def step(engine: Any = engine, microbatches: list[Microbatch] = microbatches) -> None:
        losses.append(engine.train_step(microbatches, 1e-4).loss)

    for _ in range(WARM_UP_STEPS):
        step()
    seconds = [_timed(step, device) for _ in range(steps)]
    tokens_per_step = config.train.global_batch_size * seq
    median = statistics.median(seconds)
    peak = peak_flops(device, config.train.precision)
    flops = flops_per_token(config.model, VOCAB_SIZE)
    row = Row(
        size=size,
        overrides=overrides,
        num_parameters=count_parameters(config.model, VOCAB_SIZE).total,
        seq_length=seq,
        tokens_per_step=tokens_per_step,
        step_seconds=median,
        step_seconds_min=min(seconds),
        step_seconds_max=max(seconds),
        tokens_per_second=tokens_per_step / median,
        mfu=flops * tokens_per_step / median / (peak * world_size) if peak else None,
        memory_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        loss=losses[-1],
    )
    del step, engine, built, microbatches, tokens
    destroy_groups()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row


def _shape(size: str) -> list[str]:
    layers, hidden, heads = SIZES[size]
    return [
        "model=gpt2_124m",
        "model.position_embedding=rope",
        "model.bias=false",
        f"model.num_layers={layers}",
        f"model.hidden_size={hidden}",
        f"model.ffn_hidden_size={4 * hidden}",
        f"model.num_attention_heads={heads}",
        f"model.num_query_groups={heads}",
        f"tokenizer.vocab_size={VOCAB_SIZE}",
    ]


def _timed(step: Callable[[], None], device: Any) -> float:
    """Seconds of one call, by the device's clock where it has one."""
    import torch

    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sizes", default="125m,760m,1b")
    parser.add_argument("--variants", default="", help="several sets of overrides, separated by ';'")
    arguments, overrides = parser.parse_known_args()
    quiet.silence()
    import torch

    from distllm.runtime import dist

    runtime = dist.start(timedelta(minutes=5))
    rows: list[Row] = []
    for size in arguments.sizes.split(","):
        for variant in arguments.variants.split(";"):
            try:
                rows.append(measure(size, [*overrides, *variant.split()], arguments.steps))
            except torch.OutOfMemoryError as error:
                print(f"{size} {variant}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            if runtime.is_main:
                _print(rows[-1], variant)
    if runtime.is_main and arguments.json:
        arguments.json.write_text(json.dumps(_report(rows, runtime.device), indent=1) + "\n")
    dist.stop(succeeded=True)


def _print(row: Row, variant: str) -> None:
    mfu = f"{row.mfu:6.1%}" if row.mfu else "     -"
    memory = f"{row.memory_bytes / 2**30:6.1f} GiB" if row.memory_bytes else ""
    print(
        f"{row.size:>5}  seq {row.seq_length:>5}  {row.tokens_per_step:>8,} tokens/step  "
        f"{row.step_seconds * 1e3:8.1f} ms "
        f"({row.step_seconds_min * 1e3:.1f}-{row.step_seconds_max * 1e3:.1f})  "
        f"{row.tokens_per_second:>9,.0f} tok/s  MFU {mfu}  {memory}  {variant}",
        flush=True,
    )


def _report(rows: list[Row], device: Any) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "deepspeed", "megatron-core")},
        "command": " ".join(sys.argv),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()

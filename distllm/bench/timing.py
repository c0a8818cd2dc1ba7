"""Measure seconds of repeated calls, the speed of matrix products, and memory of this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from distllm.layout.dtypes import DTYPES
from distllm.runtime.allocator import release_freed_memory

# Rows of square matrices, large enough to reach a device's best rate; a product takes some milliseconds.
PRODUCT_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
PRODUCTS_PER_SIZE = 5
LONG_PRODUCT_SECONDS = 0.1


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: by events on the stream of a GPU, else by the monotonic clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def repeated_seconds(
    call: Callable[[], object], device: torch.device, warmup: int, repeats: int
) -> list[float]:
    """Return the seconds of each of `repeats` calls, after `warmup` calls that are not counted."""
    for _ in range(warmup):
        call()
    return [seconds_of(call, device) for _ in range(repeats)]


def measured_peak_flops(device: torch.device, precision: str) -> float:
    """Return FLOP/s of the fastest of some large square matrix products: what this process can reach here.

    The next larger size is left out where one took long: a processor without bf16 takes a minute for the
    largest product, and is no faster with it.
    """
    best = 0.0
    for size in PRODUCT_SIZES[device.type]:
        a = torch.rand(size, size, device=device).to(DTYPES[precision])
        b, product = torch.rand_like(a), torch.empty_like(a)

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = product) -> None:
            torch.mm(a, b, out=out)

        seconds = min(repeated_seconds(multiply, device, warmup=1, repeats=PRODUCTS_PER_SIZE))
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_PRODUCT_SECONDS:
            break
    return best


def over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    """Reduce the values of all ranks to one."""
    result = torch.tensor(float(value), dtype=torch.float64)
    if torch.cuda.is_available():
        result = result.cuda()
    dist.all_reduce(result, operation)
    return result.item()


class PeakMemory:
    """The most memory that was added since this object was made, in bytes.

    On a GPU what PyTorch has allocated; without one, the resident set of this process as the kernel counts
    it, whose peak is reset first (Linux).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            release_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
            self._before = resident_bytes("VmRSS")

    def extra_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        return resident_bytes("VmHWM") - self._before


def resident_bytes(field: str) -> int:
    """Return a field of the process's status. VmRSS: memory now; VmHWM: the most so far."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:")]
    return int(line.split()[1]) << 10

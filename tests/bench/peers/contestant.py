"""What every contestant shares: the job, the batches, and turns by the driver's commands.

A contestant is a process. It trains without end and calls `Turns.step_ended` after every update; that returns
once the driver grants more steps, by a line with their number on standard input, and answers each grant with
a line of JSON on standard output. What libraries print there goes to standard error.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

LEARNING_RATE, BETAS, EPSILON, CLIP_GRAD = 1e-3, (0.9, 0.95), 1e-8, 1.0
# 0: whether norms decay, too, is a matter of taste, and must not tell the losses apart.
WEIGHT_DECAY = 0.0


@dataclass(frozen=True)
class Job:
    """Shape, batch and precision, equal for all contestants. weights: Llama's in safetensors, by the names of
    transformers. micro_batch_size, num_microbatches: of each rank. options: what tells variants of one
    program apart."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    vocab_size: int
    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    precision: str
    warmup_steps: int
    weights: str
    options: dict[str, Any]

    @property
    def is_bf16(self) -> bool:
        return self.precision == "bf16"


def start() -> tuple[Job, Turns]:
    """Called when all is imported: from here memory counts."""
    job = Job(**json.loads(sys.argv[1]))
    return job, Turns(job.warmup_steps)


def batches(job: Job) -> Iterator[list[torch.Tensor]]:
    """Of each step this rank's microbatches, [micro_batch, seq + 1] random tokens, the same for everyone."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for step in itertools.count():
        generator = torch.Generator().manual_seed(step * world_size + rank)
        size = (job.num_microbatches * job.micro_batch_size, job.seq_length + 1)
        yield list(torch.randint(job.vocab_size, size, generator=generator).split(job.micro_batch_size))


class Turns:
    """Grants of steps, and what was measured in them."""

    parameters = 0  # set by the contestant, as its own library counts them

    def __init__(self, warmup_steps: int) -> None:
        self._remaining = warmup_steps
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._startup_seconds: float | None = None
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of imports
        self._import_bytes = _resident_bytes("VmRSS")
        self._began = time.perf_counter()

    def step_ended(self, loss: torch.Tensor | float) -> None:
        """After an update. A step lasts from the end of the one before it: nothing is left out."""
        self._seconds.append(time.perf_counter() - self._began)
        self._losses.append(float(loss))
        if self._startup_seconds is None:
            self._startup_seconds = time.monotonic() - float(os.environ["CONTESTANT_STARTED"])
        self._remaining -= 1
        if self._remaining == 0:
            self._answer()
            self._remaining = _next_grant()
        self._began = time.perf_counter()

    def _answer(self) -> None:
        answer = {
            "seconds": self._seconds,
            "losses": self._losses,
            "parameters": self.parameters,
            "startup_seconds": self._startup_seconds,
            "import_bytes": self._import_bytes,
            "peak_bytes": _resident_bytes("VmHWM") - self._import_bytes,
        }
        print(json.dumps(answer), file=ANSWERS, flush=True)
        self._seconds, self._losses = [], []


def _next_grant() -> int:
    line = sys.stdin.readline()
    if not line.strip():
        os._exit(0)  # no library gets to wait for its peers
    return int(line)


def _resident_bytes(field: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:")]
    return int(line.split()[1]) << 10

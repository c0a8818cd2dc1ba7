"""Time and memory of saving and loading, beside PyTorch's own ways.

    python tests/bench/checkpoint.py [--folder DIR] [--json FILE]

Time: one process, 302 million parameters with two moments in fp32 (3.4 GiB), everything flushed to the disk
(fsync); files leave the page cache before they are loaded. While a save goes on in the background the main
thread multiplies matrices: its speed beside that of an idle process. Memory: four gloo ranks, a model of 118
million parameters, the most anonymous memory that a rank needs beside the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch import Tensor

from distllm.checkpoint.manifest import find_damage
from distllm.checkpoint.saver import Saver
from distllm.checkpoint.store import Contents, read_tensors
from distllm.layout.fragment import Fragment
from distllm.layout.place import Place
from distllm.layout.save_groups import SaveGroups
from distllm.metrics.environment import describe_environment
from distllm.runtime import quiet

if TYPE_CHECKING:
    from saving_memory import SavingMemory

SHAPE, NUM_LAYERS = (8192, 2048), 18
STATES = ("weight", "exp_avg", "exp_avg_sq")
CONTENTS = Contents(1, {"step": 1.0}, {})
# 118 million parameters; no piece is more than a tenth of a rank's share.
MODEL = (
    "model.num_layers=12",
    "model.hidden_size=896",
    "model.ffn_hidden_size=2432",
    "model.num_attention_heads=14",
    "model.num_query_groups=14",
    "train.micro_batch_size=1",
)
LAYOUTS = {
    "ZeRO-3 on 4": ("zero.stage=3",),
    "TP2 PP2": ("zero.stage=1", "parallel.tensor=2", "parallel.pipeline=2"),
    "ZeRO-0 on 4": ("zero.stage=0",),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """blocking_seconds: for which training stands still. speed: of the main thread while the rest is written,
    1 is that of an idle process; None where there is no rest."""

    what: str
    blocking_seconds: float
    seconds: float
    speed: float | None = None


class Model:
    """Flat buffers as ZeRO has them, seen layer by layer."""

    def __init__(self) -> None:
        numel = SHAPE[0] * SHAPE[1]
        self.flat = {state: torch.rand(NUM_LAYERS * numel) for state in STATES}
        places = [
            Place(f"decoder.layers.{i}.weight", SHAPE, SHAPE, (0, 0), primary=True) for i in range(NUM_LAYERS)
        ]
        self.fragments = [
            Fragment(
                place,
                0,
                numel,
                {state: flat[i * numel : (i + 1) * numel] for state, flat in self.flat.items()},
                writer=True,
            )
            for i, place in enumerate(places)
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As a state dict for PyTorch."""
        return {
            f"{state}/{fragment.place.name}": tensor.view(SHAPE)
            for fragment in self.fragments
            for state, tensor in fragment.tensors.items()
        }


def time_all(rank: int, folder: Path) -> list[Timing]:
    model, path = Model(), folder / "step_00000001"
    idle_speed = _speed_until(_seconds_from_now(3))
    timings = []
    for name, save, load in (
        ("ours, at once", _ours(model, path, is_async=False), _load_ours(model, path)),
        ("ours, in the background", _ours(model, path, is_async=True), {}),
        ("torch.save", _torch_save(model, path), _torch_load(model, path)),
        (
            "dcp.save",
            _dcp_save(model, path),
            {"dcp.load": lambda: dcp.load(model.tensors, checkpoint_id=path)},
        ),
        ("dcp.async_save", _dcp_async_save(model, path), {}),
    ):
        repetitions = ("", ", again") if name in ("ours, in the background", "dcp.async_save") else ("",)
        for which in repetitions:
            _remove(path)
            begin = time.monotonic()
            is_done = save()
            blocking, speed = time.monotonic() - begin, None
            if not is_done():
                speed = _speed_until(is_done) / idle_speed
            timings.append(Timing(name + which, blocking, time.monotonic() - begin, speed))
            print(timings[-1], flush=True)
        for what, work in load.items():
            _forget(path)
            begin = time.monotonic()
            work()
            seconds = time.monotonic() - begin
            timings.append(Timing(what, seconds, seconds))
            print(timings[-1], flush=True)
    _remove(path)
    return timings


# Each begins a save and returns how to ask whether it is done.
Save = Callable[[], Callable[[], bool]]
Loads = dict[str, Callable[[], object]]


def _ours(model: Model, path: Path, is_async: bool) -> Save:
    saver = Saver(SaveGroups(), is_async)

    def is_done() -> bool:
        return bool(saver.outcomes())

    def save() -> Callable[[], bool]:
        saver.save(path, model.fragments, CONTENTS, after=lambda: None)
        return is_done

    return save


def _load_ours(model: Model, path: Path) -> Loads:
    def verify_and_read() -> None:
        assert find_damage(path) is None
        read_tensors(path, model.fragments)

    return {
        "our load": lambda: read_tensors(path, model.fragments),
        "our load, verified": verify_and_read,
    }


def _torch_save(model: Model, path: Path) -> Save:
    def save() -> Callable[[], bool]:
        path.mkdir(parents=True)
        with open(path / "all.pt", "wb") as stream:
            torch.save(model.flat, stream)
            stream.flush()
            os.fsync(stream.fileno())
        return lambda: True

    return save


def _torch_load(model: Model, path: Path) -> Loads:
    def load() -> None:
        for state, flat in torch.load(path / "all.pt").items():
            model.flat[state].copy_(flat)

    return {"torch.load": load}


def _dcp_save(model: Model, path: Path) -> Save:
    def save() -> Callable[[], bool]:
        dcp.save(model.tensors, storage_writer=dcp.FileSystemWriter(path, sync_files=True))
        return lambda: True

    return save


def _dcp_async_save(model: Model, path: Path) -> Save:
    def save() -> Callable[[], bool]:
        future = dcp.async_save(model.tensors, storage_writer=dcp.FileSystemWriter(path, sync_files=True))
        assert isinstance(future, Future), "the thread's own future"
        return future.done

    return save


def _seconds_from_now(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _speed_until(is_done: Callable[[], bool]) -> float:
    """Products of 256 x 256 matrices a second; a step of training asks as rarely what became of a save."""
    matrix, count, begin = torch.rand(256, 256), 0, time.monotonic()
    while not is_done():
        for _ in range(20):
            matrix @ matrix
        count += 20
    return count / (time.monotonic() - begin)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.sync()


def _forget(path: Path) -> None:
    """Out of the page cache."""
    os.sync()
    for file in filter(Path.is_file, path.rglob("*")):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_memory(folder: Path) -> dict[str, list[SavingMemory]]:
    """{layout: by rank}."""
    from saving_memory import (
        measure_saving,
    )  # not above: DeepSpeed and Megatron Core are loud if not silenced

    return {
        name: run_ranks(4, measure_saving, folder, (*MODEL, *overrides), deadline_seconds=600)
        for name, overrides in LAYOUTS.items()
    }


def time_table(timings: list[Timing], num_bytes: int) -> Iterator[str]:
    yield "| | blocks | takes | speed meanwhile |"
    yield "|-|-:|-:|-:|"
    for row in timings:
        speed = "" if row.speed is None else f"{row.speed:.0%}"
        takes = f"{row.seconds:.2f} s ({num_bytes / row.seconds / 1e9:.2f} GB/s)"
        yield f"| {row.what} | {row.blocking_seconds:.2f} s | {takes} | {speed} |"


def memory_table(found: dict[str, list[SavingMemory]]) -> Iterator[str]:
    """In MB, of the rank that needs most."""
    whats = list(next(iter(found.values()))[0].peaks)
    yield "| MB | whole model | a rank's share | largest piece | " + " | ".join(whats) + " |"
    yield "|-|" + "-:|" * (3 + len(whats))
    for layout, ranks in found.items():
        sizes = [ranks[0].whole, max(r.share for r in ranks), max(r.largest_piece for r in ranks)]
        cells = sizes + [max(r.peaks[what] for r in ranks) for what in whats]
        yield f"| {layout} | " + " | ".join(f"{cell / 1e6:.0f}" for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "results" / f"checkpoint_cpu_{datetime.now(UTC):%Y-%m-%d}.json"
    parser.add_argument("--json", type=Path, default=default)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; 5 GB are needed")
    arguments = parser.parse_args()
    quiet.silence()
    num_bytes = 4 * len(STATES) * NUM_LAYERS * SHAPE[0] * SHAPE[1]
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=arguments.folder) as folder:
        (timings,) = run_ranks(1, time_all, Path(folder), deadline_seconds=900)
        print("\n".join(time_table(timings, num_bytes)), flush=True)
        memory = measure_memory(Path(folder))
        print("\n".join(memory_table(memory)))
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": describe_environment(),
        "load_average": os.getloadavg(),
        "bytes": num_bytes,
        "timings": [dataclasses.asdict(timing) for timing in timings],
        "memory": {name: [dataclasses.asdict(rank) for rank in ranks] for name, ranks in memory.items()},
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time and memory of saving and loading, beside PyTorch's own ways.

    python tests/bench/checkpoint.py [--folder DIR] [--json FILE]

Time: one process, 302 million parameters with two moments in fp32 (3.4 GiB), everything flushed to the disk
(fsync); files leave the page cache before they are loaded. While a save goes on in the background the main
thread multiplies matrices: its speed beside that of an idle process. What other processes disturb is tried
again, and the quietest try counts. Memory: four gloo ranks, a model of 118 million parameters, the most
anonymous memory that a rank needs beside the model.
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
os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])  # for the ranks

import torch
import torch.distributed.checkpoint as dcp
from harness import run_ranks
from torch import Tensor

from distllm.bench.saving import Timing, Way, at_once, forget, others_cpu_seconds, time_way
from distllm.checkpoint.async_writer import Saver
from distllm.checkpoint.manifest import find_damage
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
QUIET_CORES, MOST_TRIES, MOST_WAIT_SECONDS = 0.2, 4, 40
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
    path = folder / "step_00000001"
    timings = []
    for way in ways(Model(), path):
        timings.append(_time(way, path))
        print(timings[-1], flush=True)
    _remove(path)
    return timings


def _time(way: Way, path: Path) -> Timing:
    """The try that other processes disturbed least."""
    tries: list[Timing] = []
    while len(tries) < MOST_TRIES and not any(timing.other_cores < QUIET_CORES for timing in tries):
        forget(path) if way.is_load else _remove(path)
        _wait_for_quiet()
        tries.append(time_way(way))
    return min(tries, key=lambda timing: timing.other_cores)


def ways(model: Model, path: Path) -> Iterator[Way]:
    """Those that load what the one before them has saved follow it."""
    yield Way("ours, at once", lambda: _save(Saver(SaveGroups(), is_async=False), model, path))
    yield Way("our load", at_once(lambda: read_tensors(path, model.fragments)), is_load=True)
    yield Way("our load, verified", at_once(lambda: _verify_and_read(model, path)), is_load=True)
    yield Way("ours, in the background", lambda: _save(Saver(SaveGroups(), is_async=True), model, path))
    saver = Saver(SaveGroups(), is_async=True)
    _until(_save(saver, model, path))
    yield Way("ours, in the background, again", lambda: _save(saver, model, path))
    yield Way("torch.save", at_once(lambda: _torch_save(model, path)))
    yield Way("torch.load", at_once(lambda: _torch_load(model, path)), is_load=True)
    yield Way("dcp.save", at_once(lambda: dcp.save(model.tensors, storage_writer=_dcp_writer(path))))
    yield Way("dcp.load", at_once(lambda: dcp.load(model.tensors, checkpoint_id=path)), is_load=True)
    yield Way("dcp.async_save", lambda: _dcp_async_save(model, path))


def _save(saver: Saver, model: Model, path: Path) -> Callable[[], bool]:
    saver.save(path, model.fragments, CONTENTS, after=lambda: None)
    return lambda: bool(saver.outcomes())


def _verify_and_read(model: Model, path: Path) -> None:
    assert find_damage(path) is None
    read_tensors(path, model.fragments)


def _torch_save(model: Model, path: Path) -> None:
    path.mkdir(parents=True)
    with open(path / "all.pt", "wb") as stream:
        torch.save(model.flat, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _torch_load(model: Model, path: Path) -> None:
    for state, flat in torch.load(path / "all.pt").items():
        model.flat[state].copy_(flat)


def _dcp_writer(path: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, sync_files=True)


def _dcp_async_save(model: Model, path: Path) -> Callable[[], bool]:
    future = dcp.async_save(model.tensors, storage_writer=_dcp_writer(path))
    assert isinstance(future, Future), "without a stager of its own there is one future"
    return future.done


def _wait_for_quiet() -> None:
    """Until other processes leave the cores alone, or for as long as that is waited for."""
    deadline = time.monotonic() + MOST_WAIT_SECONDS
    while time.monotonic() < deadline:
        busy = others_cpu_seconds()
        time.sleep(1)
        if others_cpu_seconds() - busy < QUIET_CORES / 2:
            return


def _until(is_done: Callable[[], bool]) -> None:
    while not is_done():
        time.sleep(0.1)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.sync()


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
    yield "| | blocks | takes | speed meanwhile | others |"
    yield "|-|-:|-:|-:|-:|"
    for row in timings:
        speed = "" if row.speed is None else f"{row.speed:.0%}"
        takes = f"{row.seconds:.2f} s ({num_bytes / row.seconds / 1e9:.2f} GB/s)"
        yield f"| {row.what} | {row.blocking_seconds:.2f} s | {takes} | {speed} | {row.other_cores:.1f} |"


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
        (timings,) = run_ranks(1, time_all, Path(folder), deadline_seconds=2700)
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

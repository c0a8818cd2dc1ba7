"""`distllm` commands in processes of their own.

start(folder, "train", "model=tiny")          # as a user starts it: a new interpreter
fork(folder, "train", "model=tiny")           # forked from the warm process of harness.py: no import to wait
                                              # for; the same main(), exit code and standard streams
fork(folder, ..., sabotage=function)          # after function() has broken something in that process
ForkedJob(folder, ..., num_ranks=4)           # the same on several ranks, to be watched and killed
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from harness import free_port

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """exit_code: negative is the signal that ended the process, as in subprocess."""

    exit_code: int | None
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def command(*arguments: str, num_ranks: int | None = None) -> list[str]:
    """The command line; num_ranks: under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port"]
    return [
        sys.executable,
        *([*launcher, str(free_port())] if num_ranks else []),
        "-m",
        "distllm",
        *arguments,
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *arguments: str, num_ranks: int | None = None) -> Finished:
    result = subprocess.run(
        command(*arguments, num_ranks=num_ranks),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Finished(result.returncode, result.stdout, result.stderr)


HEAVY = (
    "torch",
    "megatron",
    "deepspeed",
    "numpy",
    "datasets",
    "transformers",
    "tokenizers",
    "safetensors",
    "matplotlib",
)
SECONDS_OF_AN_ANSWER = 1.0
LIBRARIES = "import hydra._internal.utils, omegaconf, pydantic, yaml"


def assert_light(code: str, folder: Path) -> None:
    """An answer imports nothing heavy, and takes a second of a processor at most.

    On a slow processor six times what the import of the libraries takes that it cannot do without; it was
    four times on one where that is 0.5 s.
    """
    check = f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])"
    bound = max(SECONDS_OF_AN_ANSWER, 6 * _processor_seconds_of_libraries())
    least, heavy = _processor_seconds(check, folder, enough=bound)
    assert heavy == "[]"
    assert least < bound


@functools.cache
def _processor_seconds_of_libraries() -> float:
    return _processor_seconds(LIBRARIES, Path(tempfile.gettempdir()))[0]


def _processor_seconds(code: str, folder: Path, enough: float = 0.0) -> tuple[float, str]:
    """The quickest of up to four runs of some Python, since other work only ever makes it slower; its last
    line. enough: no further run after one below it."""
    seconds: list[float] = []
    lines = [""]
    while len(seconds) < 4 and min(seconds, default=enough) >= enough:
        before = os.times()
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True
        )
        after = os.times()
        assert result.returncode == 0, result.stderr
        user = after.children_user - before.children_user
        seconds.append(user + after.children_system - before.children_system)
        lines = result.stdout.splitlines() or [""]
    return min(seconds), lines[-1]


class ForkedJob:
    """A command on one or several ranks, without a launcher; all of it is killed at the end of the `with`.

    sabotage: called in each rank before the command; must be importable by name (module level).
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        num_ranks: int = 1,
        sabotage: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm"])
        self.arguments = arguments
        self._streams = tempfile.TemporaryDirectory(prefix="command-")
        self._files = [
            [Path(self._streams.name, f"{name}{rank}") for name in ("stdout", "stderr")]
            for rank in range(num_ranks)
        ]
        port = free_port()
        self.processes: list[ForkServerProcess] = []
        for rank in range(num_ranks):
            place = dict(environment or {})  # the forkserver has the environment of its own start
            if num_ranks > 1:
                place |= _rank_environment(rank, num_ranks, port)
            process = context.Process(
                target=_main, args=(str(folder), arguments, self._files[rank], sabotage, place), daemon=True
            )
            process.start()
            self.processes.append(process)

    def __enter__(self) -> ForkedJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._streams.cleanup()

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to all ranks at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, seconds: float = 120) -> list[Finished]:
        """How every rank ended; an assertion with their output if one has not within `seconds`."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = self.is_alive
        self.kill()
        ended = [
            Finished(process.exitcode, *(file.read_text(errors="replace") for file in files))
            for process, files in zip(self.processes, self._files, strict=True)
        ]
        output = "".join(f"\n----- rank {rank} -----\n{end.output}" for rank, end in enumerate(ended))
        assert not hung, f"distllm {' '.join(self.arguments)} hung:{output}"
        return ended


def fork(folder: Path, *arguments: str, sabotage: Callable[[], None] | None = None) -> Finished:
    """One process, to its end."""
    with ForkedJob(folder, *arguments, sabotage=sabotage) as job:
        return job.wait()[0]


def _rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _main(
    folder: str,
    arguments: tuple[str, ...],
    files: list[Path],
    sabotage: Callable[[], None] | None,
    place: dict[str, str],
) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.chdir(folder)
    os.environ.update(place)
    import torch

    from distllm.__main__ import main

    torch.set_num_threads(1)
    if sabotage:
        sabotage()
    sys.exit(main(arguments))

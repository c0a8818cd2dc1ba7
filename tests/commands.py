"""`distllm` commands in processes of their own.

start(folder, "train", "model=tiny")          # as a user starts it: a new interpreter
fork(folder, "train", "model=tiny")           # forked from the warm process of harness.py: no import to wait
                                              # for; the same main(), exit code and standard streams
fork(folder, ..., sabotage=function)          # after function() has broken something in that process
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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


def fork(folder: Path, *arguments: str, sabotage: Callable[[], None] | None = None) -> Finished:
    """`sabotage` must be importable by name (module level)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with tempfile.TemporaryDirectory(prefix="command-") as streams:
        files = [Path(streams, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_main, args=(str(folder), arguments, files, sabotage), daemon=True)
        process.start()
        process.join(120)
        hung = process.is_alive()
        process.kill()
        process.join()
        stdout, stderr = (file.read_text(errors="replace") for file in files)
        assert not hung, f"distllm {' '.join(arguments)} hung:\n{stdout}{stderr}"
        return Finished(process.exitcode, stdout, stderr)


def _main(
    folder: str, arguments: tuple[str, ...], files: list[Path], sabotage: Callable[[], None] | None
) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.chdir(folder)
    import torch

    from distllm.__main__ import main

    torch.set_num_threads(1)
    if sabotage:
        sabotage()
    sys.exit(main(arguments))

"""Starting and stopping a job leaves nothing behind: no hang, no abort, no process, no shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone  # it looks at all shared memory of the machine

ROOT = Path(__file__).parents[2]


def processes_of(run_dir: Path) -> list[str]:
    """Processes whose command line names the run directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if str(run_dir) in command:
            found.append(command)
    return found


@pytest.mark.long
@pytest.mark.parametrize("starts", [range(1, 3), pytest.param(range(20), marks=pytest.mark.nightly)])
def test_starts_and_stops_of_four_ranks(starts: range, tmp_path: Path) -> None:
    """Two: ZeRO stage 1 with a pipeline, stage 2 without. Twenty, with all stages, find what is rare."""
    (tmp_path / "text.txt").write_text("Nothing is left behind. " * 500)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    shared_memory = set(os.listdir("/dev/shm"))
    for start in starts:
        run_dir = tmp_path / f"run{start}"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4"),
            f"--log-dir={tmp_path}/logs",  # else torchrun leaves an empty folder of its own
            *("-m", "distllm", "train"),
            *("model=tiny", "tokenizer=bytes", "data=text", f"data.path={tmp_path}/*.txt"),
            *("data.validation_fraction=0", "train.validation_interval=0", "checkpoint.interval=0"),
            *(
                "train.steps=2",
                "train.global_batch_size=8",
                "train.micro_batch_size=2",
                "logging.sample_tokens=0",
                f"run.dir={run_dir}",
            ),
            *("parallel.tensor=2", f"parallel.pipeline={1 + start % 2}"),
            *(f"zero.stage={start % 4}", f"data.cache={tmp_path}/cache"),
        ]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"start {start}:\n{result.stdout}\n{result.stderr}"
        assert not processes_of(run_dir), f"start {start} left processes behind"
    # PyTorch makes the folder of its compilation cache when it is imported, to be shared by all runs.
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    assert left == [], "files or sockets are left"
    assert set(os.listdir("/dev/shm")) <= shared_memory

"""All tests of tests/gpu, then the speed of three models, on the GPUs of this machine: one file to mail back.

    launch/gpu-check [FILE]             # sets up .venv first; FILE is gpu-check_HOST_DATE.json by default

Of 1, 2, 4 or 8 GPUs, the most that are there. Exit code 0 if all went well, 1 if not, 2 without a GPU. The
file is written anew after each part, so that an interrupted check leaves what it has found.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from gpu_results import (  # noqa: E402
    BENCHES,
    SECONDS_OF_A_BENCH,
    TAIL_CHARACTERS,
    Bench,
    bench_row,
    gpus_to_use,
    is_good,
    read_tests,
    summary,
    visible_devices,
)

from distllm.metrics.environment import describe_environment  # noqa: E402

EXIT_NO_GPU = 2


def main() -> int:
    num_gpus = gpus_to_use(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if num_gpus == 0:
        print(f"gpu-check: no GPU here: PyTorch {torch.__version__} sees none", file=sys.stderr)
        return EXIT_NO_GPU
    now = datetime.now(UTC)
    name = f"gpu-check_{platform.node()}_{now:%Y-%m-%d_%H%M}.json"
    file = Path(sys.argv[1] if len(sys.argv) > 1 else name).absolute()
    results: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "machine": describe_environment() | describe_gpus(),
        "num_gpus": num_gpus,
        "tests": [],
        "benches": [],
    }
    write(file, results)
    devices = visible_devices(num_gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        print(f"gpu-check: tests on {num_gpus} of {results['machine']['gpus']}", flush=True)
        results["tests"] = run_tests(Path(folder), environment)
        write(file, results)
        for count in sorted({1, num_gpus}):
            for bench in BENCHES:
                results["benches"].append(run_bench(bench, count, Path(folder), environment))
                write(file, results)
    print(f"{summary(results)}\ngpu-check: results are in {file}")
    return 0 if is_good(results) else 1


def describe_gpus() -> dict[str, Any]:
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "cudnn": torch.backends.cudnn.version(),
        "driver": said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "topology": said("nvidia-smi", "topo", "-m"),
    }


def said(*command: str) -> list[str]:
    """The lines that a command prints; what went wrong if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [str(error)]


def run_tests(folder: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    junit = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", f"--junitxml={junit}"]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if junit.exists():
        return read_tests(junit.read_text())
    return [{"name": "pytest", "outcome": "error", "message": f"it ended with exit code {code}"}]


def run_bench(bench: Bench, num_gpus: int, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    file = folder / f"{bench.recipe}_{bench.seq_length}_{num_gpus}.json"
    print(f"gpu-check: {bench.recipe}, {bench.seq_length} tokens a sequence, {num_gpus} GPUs", flush=True)
    command = [
        *(str(ROOT / "launch" / "torchrun.sh"), "--nproc-per-node", str(num_gpus), "-m", "distllm"),
        *(*bench.arguments, f"bench.json={file}"),
    ]
    log = folder / "output"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        code: int | None
        try:
            code = process.wait(SECONDS_OF_A_BENCH)
        except subprocess.TimeoutExpired:
            process.terminate()  # the agent ends its ranks
            process.wait()
            code = None
    text = log.read_text(errors="replace")
    print(text[-TAIL_CHARACTERS:], flush=True)
    return bench_row(bench, num_gpus, code, text, file)


def write(file: Path, results: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.rename(file)


if __name__ == "__main__":
    sys.exit(main())

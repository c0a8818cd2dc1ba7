"""The same job on 1, 2, 4 and 8 ranks writes metrics.jsonl files whose losses agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    1: (),
    2: ("parallel.tensor=2", "parallel.sequence=true", "zero.stage=2"),
    4: ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "zero.stage=3"),
    8: ("parallel.tensor=2", "parallel.pipeline=2", "zero.stage=1"),
}


def rows(ranks: int, folder: Path) -> list[dict[str, float]]:
    """The rows of a run under a launcher, or alone."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [
        *(sys.executable, *launcher, "-m", "distllm", "train", "model=tiny", "tokenizer=bytes", "data=text"),
        *(f"data.path={folder}/*.txt", f"data.cache={folder}/cache", "data.validation_fraction=0.2"),
        *("train.steps=12", "train.global_batch_size=16", "train.micro_batch_size=2"),
        *("train.validation_interval=6", "train.validation_sequences=5", "checkpoint.interval=0"),
        *("schedule.warmup_steps=2", "optimizer.lr=0.003", "optimizer.epsilon=1e-6"),
        *(f"run.dir={folder}/run{ranks}", *LAYOUTS[ranks]),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in (folder / f"run{ranks}" / "metrics.jsonl").read_text().splitlines()]


def test_losses_agree(tmp_path: Path) -> None:
    for document in range(30):
        text = f"Document {document} of thirty says: {'the same and more, ' * (document + 5)}"
        (tmp_path / f"{document}.txt").write_text(text)
    expected = rows(1, tmp_path)
    assert expected[10]["loss"] < expected[0]["loss"] - 0.3, "a run in which nothing is learnt proves little"
    for ranks in (2, 4, 8):
        for row, reference in zip(rows(ranks, tmp_path), expected, strict=True):
            assert row["step"] == reference["step"]
            for name in ("loss", "grad_norm", "validation_loss", "validation_bits_per_byte"):
                if name in reference:
                    # Rounding of partial sums in fp32, as in jobs.assert_traces_equal.
                    assert row[name] == pytest.approx(reference[name], rel=1e-5), f"{ranks} ranks: {name}"

"""The same job on 1, 2, 4 and 8 ranks writes metrics.jsonl files whose losses agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import ForkedJob
from runs import read_rows

LAYOUTS = {
    1: (),
    2: ("parallel.tensor=2", "parallel.sequence=true", "zero.stage=2"),
    4: ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "zero.stage=3"),
    8: ("parallel.tensor=2", "parallel.pipeline=2", "zero.stage=1"),
}


def rows(ranks: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of a run; tests/launch/test_launchers.py has ranks under launchers."""
    arguments = (
        *("model=tiny", "tokenizer=bytes", "data=text", "data.path=*.txt", "data.cache=cache"),
        *("data.validation_fraction=0.2", "train.validation_interval=4", "train.validation_sequences=5"),
        *("train.steps=8", "train.global_batch_size=16", "train.micro_batch_size=4"),
        *("checkpoint.interval=0", "schedule.warmup_steps=2", "optimizer.lr=0.003", "optimizer.epsilon=1e-6"),
        *(f"run.dir=run{ranks}", *LAYOUTS[ranks]),
    )
    with ForkedJob(folder, "train", *arguments, num_ranks=ranks) as job:
        for end in job.wait(240):
            assert end.exit_code == 0, end.output
    return read_rows(folder / f"run{ranks}")


@pytest.mark.long
def test_losses_agree(tmp_path: Path) -> None:
    for document in range(30):
        text = f"Document {document} of thirty says: {'the same and more, ' * (document + 5)}"
        (tmp_path / f"{document}.txt").write_text(text)
    expected = rows(1, tmp_path)
    assert expected[7]["loss"] < expected[0]["loss"] - 0.3, "a run in which nothing is learnt proves little"
    for ranks in (2, 4, 8):
        for row, reference in zip(rows(ranks, tmp_path), expected, strict=True):
            assert row["step"] == reference["step"]
            for name in ("loss", "grad_norm", "validation_loss", "validation_bits_per_byte"):
                if name in reference:
                    # Rounding of partial sums in fp32, as in jobs.assert_traces_equal.
                    assert row[name] == pytest.approx(reference[name], rel=1e-5), f"{ranks} ranks: {name}"

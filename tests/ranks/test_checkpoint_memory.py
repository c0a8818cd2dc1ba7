"""No rank holds the whole model to save or to load it: peaks of memory beside the model, on four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run_ranks
from saving_memory import measure_saving

from distllm.checkpoint.integrity import READ_BYTES

pytestmark = pytest.mark.alone  # other work moves peaks of memory

# 30 million parameters: weights and moments are 360 MB, a rank's share 90 MB.
MODEL = (
    "model.num_layers=8",
    "model.hidden_size=512",
    "model.ffn_hidden_size=1728",
    "model.num_attention_heads=8",
    "model.num_query_groups=8",
    "train.micro_batch_size=1",
)
# Of threads, messages and pickled lists; 4% of what is written, and as much as the largest piece but one.
SLACK_BYTES = 4_000_000


@pytest.mark.parametrize(
    "layout",
    [("zero.stage=3",), ("zero.stage=1", "parallel.tensor=2", "parallel.pipeline=2"), ("zero.stage=0",)],
    ids=["zero 3", "tp2 pp2", "zero 0"],
)
def test_saving_takes_a_copy_of_the_share_and_loading_none(layout: tuple[str, ...], tmp_path: Path) -> None:
    ranks = run_ranks(4, measure_saving, tmp_path, (*MODEL, *layout), deadline_seconds=240)
    for rank, found in enumerate(ranks):
        assert found.whole == sum(other.share for other in ranks) > 340_000_000
        assert found.share < 0.3 * found.whole
        copy = found.peaks["first save in the background"]
        assert 0.9 * found.share < copy < found.share + SLACK_BYTES, f"rank {rank}: {found}"
        for what in ("save at once", "next save in the background", "load"):
            assert found.peaks[what] < SLACK_BYTES, f"rank {rank}, {what}: {found}"
        assert found.peaks["verify"] < 2 * READ_BYTES + SLACK_BYTES, f"rank {rank}: {found}"

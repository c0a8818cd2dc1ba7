"""`distllm data`, by shards, and what it answers to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import fork


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / f"corpus/{number:02}.txt").write_text(f"document {number} " * 20)
    return [
        "tokenizer=bytes",
        "data=text",
        "data.path=corpus/*.txt",
        "data.cache=cache",
        "data.validation_fraction=0.2",
    ]


def test_shards_and_merge(tmp_path: Path, settings: list[str]) -> None:
    early = fork(tmp_path, "data", "merge", *settings)
    assert early.exit_code == 2
    assert "1 of 1 pieces of text are missing" in early.stderr
    for shard in ("0/2", "1/2"):
        made = fork(tmp_path, "data", f"shard={shard}", *settings)
        assert made.exit_code == 0, made.output
        assert made.stdout.startswith(f"shard       {shard} is done")
    merged = fork(tmp_path, "data", "merge", *settings)
    assert merged.exit_code == 0, merged.output
    lines = merged.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["text", "train"], ["text", "validation"]]
    assert lines[2].startswith("tokenizer")
    again = fork(tmp_path, "data", *settings)
    assert again.stdout == merged.stdout
    assert len(again.stderr.splitlines()) == 1, "from the cache: only what there is"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shard=2/2"], "shard=2/2\n    rule: must be INDEX/NUMBER"),
        (["merge", "shard=0/2"], "merge puts all shards together"),
        (["mege"], "action=mege\n    rule: must be one of merge"),
    ],
)
def test_mistakes(tmp_path: Path, settings: list[str], arguments: list[str], said: str) -> None:
    refused = fork(tmp_path, "data", *arguments, *settings)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("data-*"))

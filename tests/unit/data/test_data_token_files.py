"""A changed token file is noticed at the next start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from corpora import BYTES, PREPARATION, silent

from distllm.config import schema
from distllm.config.problems import UserError
from distllm.data.preparation.prepare import prepare
from distllm.data.preparation.token_files import BLOCK_BYTES, NUM_BLOCKS, sample_digest

DAMAGES: list[Callable[[Path], object]] = [
    Path.unlink,
    lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.write_bytes(b"\xff" + file.read_bytes()[1:]),
    lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xff"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["train.bin", "train.idx", "validation.origins"])
def test_a_changed_token_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    data = schema.Data(
        source="text",
        path=str(tmp_path / "*.txt"),
        text_field="text",
        validation_fraction=0.2,
        cache=str(tmp_path / "cache"),
    )
    (source,) = prepare(data, PREPARATION, BYTES, silent).sources.values()
    prepare(data, PREPARATION, BYTES, silent)
    damage(source.folder / name)
    with pytest.raises(UserError, match=f"data.cache={source.folder / name}"):
        prepare(data, PREPARATION, BYTES, silent)


def test_samples_are_few_and_hold_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "x"
    content = bytearray(2 * NUM_BLOCKS * BLOCK_BYTES)
    file.write_bytes(content)
    known = sample_digest(file)
    changed = []
    for position in (0, len(content) // 2, len(content) - 1, BLOCK_BYTES + 1):
        content[position] = 1
        file.write_bytes(content)
        changed.append(sample_digest(file) != known)
        content[position] = 0
    assert changed[0]
    assert changed[2]
    assert not changed[3], "between two samples"

"""Arrays in files: what is read, and what becomes of a read that fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm.data import file_array
from distllm.data.file_array import FileArray


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.bin"
    path.write_bytes(b"head" + np.arange(1000, dtype="<i4").tobytes())
    return path


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A disk that fails as often as the list has entries; the waits between tries are cut short."""
    failures: list[int] = []
    preadv = os.preadv

    def failing_preadv(descriptor: int, buffers: Any, position: int) -> int:
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        return preadv(descriptor, [memoryview(buffers[0])[:100]], position)  # short reads are allowed, too

    monkeypatch.setattr(file_array.os, "preadv", failing_preadv)
    monkeypatch.setattr(file_array, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    return failures


def test_elements(file: Path) -> None:
    array = FileArray(file, np.int32, offset=4)
    assert len(array) == 1000
    assert array.read(10, 14).tolist() == [10, 11, 12, 13]
    assert array.read(7, 7).tolist() == []
    assert array.at(999) == 999
    assert len(FileArray(file, np.int32, 4, 5)) == 5
    with pytest.raises(AssertionError, match="999:1001 of 1000 elements"):
        array.read(999, 1001)


def test_a_failed_read_is_tried_again(file: Path, failing: list[int]) -> None:
    array = FileArray(file, np.int32, offset=4)
    failing += [errno.EIO, errno.ESTALE, errno.EIO]
    assert array.read(0, 1000).tolist() == list(range(1000))
    assert not failing


def test_then_it_is_named(file: Path, failing: list[int]) -> None:
    array = FileArray(file, np.int32, offset=4)
    failing += [errno.EIO] * 4
    with pytest.raises(
        OSError, match=rf"bytes 44 to 56 of {file} cannot be read, tried 4 times: .*Input/output"
    ):
        array.read(10, 13)


def test_a_file_that_was_cut_is_named(file: Path, failing: list[int]) -> None:
    array = FileArray(file, np.int32, offset=4)
    os.truncate(file, 400)
    with pytest.raises(OSError, match="the file ends at byte 400"):
        array.read(0, 1000)


def test_a_file_that_came_back_under_its_name_is_found(file: Path, failing: list[int]) -> None:
    """As after the restart of a file server: the old handle is stale."""
    array = FileArray(file, np.int32, offset=4)
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:4] + content[8:])
    failing += [errno.ESTALE]
    assert array.read(0, 2).tolist() == [1, 2]

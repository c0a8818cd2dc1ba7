"""Reading ahead changes nothing but the time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.data.prefetch import Prefetcher


def following(request: int) -> Iterator[int]:
    while True:
        request += 1
        yield request


@settings(deadline=None, max_examples=30)
@given(requests=st.lists(st.integers(0, 12), max_size=20), depth=st.integers(0, 3))
def test_every_request_gets_its_own_answer(requests: list[int], depth: int) -> None:
    """In order, with gaps, backwards and twice: as after skipped steps and rewinds."""
    prefetcher = Prefetcher(lambda request: request * request, following, depth)
    assert [prefetcher.get(request) for request in requests] == [request**2 for request in requests]
    prefetcher.close()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_what_comes_next_is_read_before_it_is_asked_for(depth: int) -> None:
    read: list[int] = []
    prefetcher = Prefetcher(lambda request: read.append(request), following, depth)
    prefetcher.get(5)
    deadline = time.monotonic() + 10
    while len(read) < 1 + depth and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == list(range(5, 6 + depth))
    prefetcher.get(6)
    prefetcher.close()
    assert read.count(6) == 1


def test_an_error_comes_with_the_request_that_it_belongs_to() -> None:
    def read(request: int) -> int:
        if request == 2:
            raise OSError("bytes 0 to 8 of x.bin cannot be read")
        return request

    prefetcher = Prefetcher(read, following, depth=2)
    assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
    with pytest.raises(OSError, match=r"x\.bin cannot be read"):
        prefetcher.get(2)
    assert prefetcher.get(3) == 3
    prefetcher.close()


def test_depth_zero_reads_in_the_callers_thread() -> None:
    prefetcher = Prefetcher(lambda _: threading.current_thread(), following, depth=0)
    assert prefetcher.get(0) is threading.current_thread()

"""Flat buckets: every element in one part of one bucket, in order, and no bucket larger than it must be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distllm.layout.flat import ALIGNMENT, pack

SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 300), st.integers(1, 7), st.integers(0, 11))
def test_parts_cover_every_parameter_once(
    numels: list[int], bucket_size: int, num_parts: int, alone: int
) -> None:
    sizes = dict(enumerate(numels))
    buckets = pack(sizes, bucket_size, num_parts, {alone})
    assert sorted(key for bucket in buckets for key in bucket.ranges) == list(sizes)
    first = [next(iter(bucket.ranges)) for bucket in buckets]
    assert first == sorted(first)
    for bucket in buckets:
        assert bucket.numel <= bucket_size + num_parts * ALIGNMENT or len(bucket.ranges) == 1
        assert alone not in bucket.ranges or len(bucket.ranges) == 1
        covered: dict[int, int] = dict.fromkeys(bucket.ranges, 0)
        for part in range(num_parts):
            where = bucket.part(part)
            assert num_parts == 1 or where.start % ALIGNMENT == 0
            found = list(bucket.pieces(part))
            assert sum(len(elements) for _, elements in found) <= where.stop - where.start
            for key, elements in found:
                assert elements.start == covered[key]
                covered[key] = elements.stop
        assert covered == {key: sizes[key] for key in bucket.ranges}


def test_a_bucket_is_closed_before_it_grows_too_large() -> None:
    def names(*sizes: int, alone: frozenset[int] = frozenset()) -> list[list[int]]:
        return [list(bucket.ranges) for bucket in pack(dict(enumerate(sizes)), 20, 1, alone)]

    assert names(*[2] * 12) == [list(range(10)), [10, 11]]
    assert names(1, 3, 1, 30, 1) == [[0, 2, 4], [1], [3]]  # an eighth of a bucket and more is not shared
    assert names(1, 1, 1, alone=frozenset({1})) == [[0, 2], [1]]


def test_one_part_has_no_padding() -> None:
    assert [bucket.numel for bucket in pack({"a": 5, "b": 6}, 40, 1)] == [5, 6]
    (bucket,) = pack({"a": 5, "b": 6}, 49, 4)
    assert (bucket.part_numel, bucket.numel) == (8, 32)
    assert list(bucket.pieces(0)) == [("a", range(5)), ("b", range(3))]
    assert list(bucket.pieces(1)) == [("b", range(3, 6))]
    assert list(bucket.pieces(2)) == []

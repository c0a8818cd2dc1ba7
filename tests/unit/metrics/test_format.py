"""Human formats: examples, and properties that no number may break."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.metrics import format as human


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_500, "12.5k"),
        (124_439_808, "124.4M"),
        (8_030_261_248, "8.03B"),
        (999_999, "1M"),
        (15 * 10**12, "15T"),
        (12 * 10**15, "12000T"),
    ],
)
def test_count(number: int, text: str) -> None:
    assert human.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**20 - 1, "1.0 MiB"),
        (80 * 2**30, "80.0 GiB"),
    ],
)
def test_bytes(number: int, text: str) -> None:
    assert human.bytes_(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4s"),
        (9.97, "10s"),
        (59.7, "1m00s"),
        (252, "4m12s"),
        (3599.6, "1h00m"),
        (7500, "2h05m"),
        (3 * 86400 + 4 * 3600, "3d04h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert human.duration(seconds) == text


@pytest.mark.parametrize(
    ("tokens_per_second", "text"),
    [
        (950.0, "950 tok/s"),
        (12_345.6, "12.3k tok/s"),
        (12_000.4, "12.0k tok/s"),
        (999.9, "1.00k tok/s"),
        (1_200_000.0, "1.20M tok/s"),
        (0.25, "0.250 tok/s"),
        (math.nan, "? tok/s"),
    ],
)
def test_rate(tokens_per_second: float, text: str) -> None:
    assert human.rate(tokens_per_second) == text


@given(st.integers(0, 10**15))
def test_count_stays_within_its_precision(number: int) -> None:
    text = human.count(number)
    factor = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * factor == pytest.approx(number, rel=5.1e-4)
    assert len(text) <= 6


@given(st.integers(0, 2**60))
def test_bytes_stays_within_its_precision(number: int) -> None:
    value, unit = human.bytes_(number).split(" ")
    exponent = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(float(value) * 1024**exponent - number) <= 0.0501 * 1024**exponent
    assert float(value) < 1024 or unit == "PiB"


@given(st.floats(0, 1e9))
def test_duration_never_shows_sixty(seconds: float) -> None:
    text = human.duration(seconds)
    assert "60" not in text.split("d")[-1]
    assert "24h" not in text

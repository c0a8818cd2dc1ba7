"""Rows from facts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.metrics.meter import Row, gzip_bits_per_byte, training_row, validation_row


def row(**changes: object) -> Row:
    facts: dict[str, object] = {
        "step": 10,
        "loss": 3.0,
        "grad_norm": 0.8,
        "learning_rate": 1e-3,
        "consumed_samples": 150,  # of the run, whose batch has grown meanwhile
        "consumed_by_source": {"text": 150},
        "step_seconds": 0.5,
        "global_batch_size": 16,
        "seq_length": 256,
        "flops_per_token": 6e6,
        "peak_flops": None,
        "peak_memory_bytes": None,
    }
    return training_row(**(facts | changes))  # type: ignore[arg-type]


def test_training_row_has_the_names_of_the_contract() -> None:
    assert row() == {
        "step": 10,
        "loss": 3.0,
        "grad_norm": 0.8,
        "learning_rate": 1e-3,
        "consumed_samples": 150,
        "consumed_tokens": 38400,
        "step_seconds": 0.5,
        "tokens_per_second": 8192.0,
    }


def test_a_mixture_has_the_tokens_of_each_source() -> None:
    mixed = row(consumed_by_source={"code": 100, "web": 50})
    assert (mixed["consumed_tokens/code"], mixed["consumed_tokens/web"]) == (25600, 12800)


def test_mfu_is_the_share_of_the_peak_of_all_devices() -> None:
    full = row(peak_flops=8192 * 6e6 * 2, peak_memory_bytes=123)
    assert full["mfu"] == pytest.approx(0.5)
    assert full["peak_memory_bytes"] == 123


def test_a_clock_that_stood_still_gives_no_rate() -> None:
    assert math.isnan(row(step_seconds=0.0)["tokens_per_second"])


@given(st.integers(1, 10**6), st.integers(1, 4096), st.floats(1e-3, 1e3))
def test_rate_times_seconds_is_the_tokens_of_a_step(step: int, batch: int, seconds: float) -> None:
    got = row(step=step, global_batch_size=batch, step_seconds=seconds)
    assert got["tokens_per_second"] * got["step_seconds"] == pytest.approx(batch * 256)
    assert got["consumed_tokens"] == got["consumed_samples"] * 256 == 150 * 256


def test_a_uniform_guess_over_bytes_costs_eight_bits_each() -> None:
    got = validation_row(5, nats_total=1000 * math.log(256), num_tokens=1000, num_bytes=1000)
    assert got["step"] == 5
    assert got["validation_loss"] == pytest.approx(math.log(256))
    assert got["validation_bits_per_byte"] == pytest.approx(8.0)


def test_numbers_without_a_divisor_are_left_out() -> None:
    assert validation_row(5, 10.0, 10, 0) == {"step": 5, "validation_loss": 1.0}
    assert validation_row(5, 0.0, 0, 0) == {"step": 5}


def test_gzip_bits_per_byte() -> None:
    repetitive, varied = gzip_bits_per_byte(b"a" * 10_000), gzip_bits_per_byte(bytes(range(256)) * 4)
    assert repetitive is not None
    assert varied is not None
    assert repetitive < 0.1 < varied
    assert gzip_bits_per_byte(b"") is None

"""The learning rate, against values worked out by hand and against PyTorch's own schedulers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distllm.config.schema import Schedule
from distllm.engine.schedule import learning_rate


def rates(schedule: Schedule, peak: float, total_steps: int) -> list[float]:
    return [
        learning_rate(step, peak=peak, total_steps=total_steps, schedule=schedule)
        for step in range(total_steps)
    ]


def test_cosine_against_pytorch() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=10, decay_steps=None, min_lr=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    expected = []
    for _ in range(90):
        optimizer.step()
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    # PyTorch recurses from step to step and gathers rounding; ours is closed.
    assert rates(schedule, 1.0, 100)[10:] == pytest.approx(expected, rel=1e-9)


def test_warmup_is_linear_and_ends_at_the_peak() -> None:
    schedule = Schedule(kind="constant", warmup_steps=4, decay_steps=None, min_lr=0.0)
    assert rates(schedule, 2.0, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_stays_at_its_floor_after_decay_steps() -> None:
    schedule = Schedule(kind="cosine", warmup_steps=2, decay_steps=4, min_lr=0.25)
    assert rates(schedule, 1.0, 10)[5:] == pytest.approx([0.25] * 5)


def test_wsd_is_stable_then_falls_linearly() -> None:
    schedule = Schedule(kind="wsd", warmup_steps=2, decay_steps=4, min_lr=0.0)
    assert rates(schedule, 1.0, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_wsd_decays_over_a_tenth_by_default() -> None:
    schedule = Schedule(kind="wsd", warmup_steps=0, decay_steps=None, min_lr=0.0)
    values = rates(schedule, 1.0, 100)
    assert values[89] == 1.0
    assert values[90:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


@given(
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.integers(0, 50),
    st.integers(1, 200),
    st.floats(0, 1),
)
def test_never_above_the_peak_nor_below_the_floor(kind: str, warmup: int, total: int, floor: float) -> None:
    schedule = Schedule(kind=kind, warmup_steps=min(warmup, total), decay_steps=None, min_lr=floor)  # type: ignore[arg-type]
    values = rates(schedule, 1.0, total)
    after_warmup = values[schedule.warmup_steps :]
    assert all(0 < value <= 1.0 for value in values[: schedule.warmup_steps])
    assert all(floor - 1e-12 <= value <= 1.0 + 1e-12 for value in after_warmup)

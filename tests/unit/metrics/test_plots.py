"""loss.png: a picture for every number of rows, drawn without a display."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distllm.metrics.meter import training_row, validation_row
from distllm.metrics.plots import plot_loss, smoothed


def rows(num_steps: int) -> list[dict[str, float | int]]:
    training = [
        training_row(
            step=step,
            loss=math.nan if step == 3 else 2 + 8 * math.exp(-step / 50) + 0.1 * math.sin(step),
            grad_norm=1.0,
            learning_rate=3e-4 * min(1.0, step / 100),
            consumed_samples=16 * step,
            consumed_by_source={"text": 16 * step},
            step_seconds=0.5,
            global_batch_size=16,
            seq_length=256,
            flops_per_token=1e6,
            peak_flops=None,
            peak_memory_bytes=None,
        )
        for step in range(1, num_steps + 1)
    ]
    return training + [validation_row(step, 300.0, 100, 400) for step in range(100, num_steps + 1, 100)]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 1500])
def test_a_picture_is_drawn(num_steps: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "loss.png"
    plot_loss(rows(num_steps), path, "tiny")
    image = imread(path)
    assert image.shape[:2] == (750, 1350)
    # The training line is the only saturated blue; its amount grows with the rows.
    blue = (image[..., 2] - image[..., 0] > 0.6) & (image[..., 1] < 0.6)
    assert blue.sum() > {0: 0, 1: 50, 2: 500, 1500: 2000}[num_steps] - 1
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_rows_without_tokens_or_finite_losses_are_drawn_too(tmp_path: Path) -> None:
    plot_loss([{"step": 0, "validation_loss": 2.0}, {"step": 1, "loss": math.inf}], tmp_path / "a.png", "odd")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from distllm.metrics.plots import plot_loss;"
        "assert 'matplotlib' not in sys.modules;"
        f"plot_loss([{{'step': 1, 'loss': 2.0}}], Path({str(tmp_path)!r}) / 'a.png', 't');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@given(st.lists(st.floats(0, 100), max_size=300))
def test_smoothing_averages_neighbours(values: list[float]) -> None:
    array = np.asarray(values)
    reach = len(values) // 60
    expected = []
    for i in range(len(values)):
        half = min(reach, i, len(values) - 1 - i)
        expected.append(float(np.mean(array[i - half : i + half + 1])))
    np.testing.assert_allclose(smoothed(array), expected, atol=1e-9)


@given(st.integers(60, 300), st.floats(-1, 1), st.floats(-5, 5))
def test_smoothing_leaves_a_straight_line_straight(num_points: int, slope: float, start: float) -> None:
    line = np.asarray([start + slope * i for i in range(num_points)])
    np.testing.assert_allclose(smoothed(line), line, atol=1e-9)

"""Draw `loss.png`, the curves of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distllm.metrics.format import count
from distllm.metrics.jsonl import write_atomically

Rows = Sequence[Mapping[str, Any]]
Array = npt.NDArray[np.float64]

INK, BLUE, ORANGE, GREY = "#333333", "#2563eb", "#ea580c", "#9ca3af"


def plot_loss(rows: Rows, path: Path, title: str) -> None:
    """Draw training loss, validation loss and learning rate over steps (and tokens) into the PNG `path`.

    rows: training and validation rows in any order. Values that are missing or not finite are left out.
    Replaces the file atomically; needs no display and touches no global state of matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_learning_rate(axes, rows)
    _draw_losses(axes, rows)
    _draw_tokens(axes, rows)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=10)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, image.getvalue())


def smoothed(values: Array) -> Array:
    """Return the centred moving average over about a thirtieth of the points; shorter at the ends: no lag."""
    reach = len(values) // 60
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    # Symmetric: a window with more points on one side would bend the steep start of a loss curve.
    half = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    averages: Array = (total[index + half + 1] - total[index - half]) / (2 * half + 1)
    return averages


def _points(rows: Rows, name: str) -> tuple[Array, Array]:
    """Return (steps, values) of the rows that have a finite `name`, in order of the steps."""
    points = sorted((row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan)))
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _draw_losses(axes: Any, rows: Rows) -> None:
    steps, losses = _points(rows, "loss")
    if len(steps) < 100:
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, losses, color=BLUE, linewidth=1.8, marker=marker, markersize=4, label="training")
    else:
        axes.plot(steps, losses, color=BLUE, linewidth=0.6, alpha=0.35, label="training, each step")
        axes.plot(steps, smoothed(losses), color=BLUE, linewidth=1.8, label="training, smoothed")
    steps, losses = _points(rows, "validation_loss")
    if len(steps):
        style = {"color": ORANGE, "linewidth": 1.2, "marker": "o", "markersize": 4.5, "zorder": 4}
        axes.plot(
            steps, losses, markeredgecolor="white", label=f"validation (last: {losses[-1]:.3f})", **style
        )
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    last_step = max((row["step"] for row in rows), default=1)
    axes.set_xlim(0, 1.02 * max(last_step, 1))
    # Above the twin axis of the learning rate, whose own background must stay visible through this one.
    axes.set_zorder(2)
    axes.patch.set_visible(False)
    handles = axes.get_lines()
    if handles:
        # With few points anywhere `best` finds a free place; with many it would be slow and change place
        # between plots.
        place = "best" if len(handles[0].get_xdata()) < 100 else "upper right"
        axes.legend(handles=handles, loc=place, edgecolor="none", framealpha=0.9)
    _quiet_frame(axes)


def _draw_learning_rate(axes: Any, rows: Rows) -> None:
    steps, rates = _points(rows, "learning_rate")
    twin = axes.twinx()
    marker = "." if len(steps) == 1 else None
    twin.plot(steps, rates, color=GREY, linewidth=1.0, linestyle=(0, (6, 2)), marker=marker, alpha=0.8)
    twin.set_ylim(0, 1.15 * rates.max(initial=0) or 1)
    twin.set_ylabel("learning rate (dashed)", color=GREY)
    twin.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    twin.tick_params(colors=GREY, length=0)
    _quiet_frame(twin)


def _draw_tokens(axes: Any, rows: Rows) -> None:
    steps, tokens = _points(rows, "consumed_tokens")
    if not len(steps) or steps[-1] <= 0 or tokens[-1] <= 0:
        return
    tokens_per_step = tokens[-1] / steps[-1]  # constant: a run has one global batch size
    upper = axes.secondary_xaxis(
        "top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step)
    )
    upper.xaxis.set_major_formatter(lambda value, _: count(round(value)) if value >= 0 else "")
    upper.set_xlabel("training tokens", color=GREY)
    upper.tick_params(colors=GREY, length=0)
    upper.spines["top"].set_visible(False)


def _quiet_frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(axis="x", colors=INK)

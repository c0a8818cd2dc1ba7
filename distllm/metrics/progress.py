"""The display during training: a bar on a terminal, plain lines elsewhere; on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TextIO

from distllm.metrics.format import duration, rate

Row = Mapping[str, float | int]

WINDOW_STEPS = 100
WARM_UP_STEPS = 5
DEFAULT_COLUMNS = 100


class Progress(Protocol):
    """One display of the training run."""

    def update(self, row: Row) -> None:
        """Show a training row; once per step, in order."""

    def note(self, text: str) -> None:
        """Print one line of text (validation results, checkpoints) without breaking the display."""

    def close(self) -> None:
        """End the display's line and leave it visible; call it before printing anything else."""


def make_progress(
    kind: Literal["auto", "bar", "lines", "none"],
    *,
    total_steps: int,
    first_step: int,
    interval: int,
    stream: TextIO | None = None,
) -> Progress:
    """Make the display that `logging.progress` selects; ranks other than 0 use `none`.

    first_step: updates done already, 0 unless resumed.
    interval: steps between two plain lines.
    stream: standard error when None.

    `auto` is a bar on a terminal that can redraw a line, else lines.
    """
    stream = stream or sys.stderr
    if kind == "auto":
        kind = "bar" if stream.isatty() and os.environ.get("TERM") != "dumb" else "lines"
    if kind == "bar":
        return BarProgress(total_steps, first_step, stream)
    if kind == "lines":
        return LineProgress(total_steps, interval, stream)
    return NoProgress()


class BarProgress:
    """One line, redrawn a few times per second."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        class Bar(tqdm):  # type: ignore[misc, no-any-unimported, unused-ignore]
            monitor_interval = 0  # no watcher thread: data workers may fork

        follow_width = not _has_no_width(stream)
        self._stream = stream
        self._remaining = RemainingTime(total_steps)
        self._bar = Bar(
            total=total_steps,
            initial=first_step,
            file=stream,
            ncols=None if follow_width else DEFAULT_COLUMNS,
            dynamic_ncols=follow_width,
            mininterval=0.2,
            miniters=1,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {desc}",
        )

    def update(self, row: Row) -> None:
        step = int(row["step"])
        # The least important last: a narrow terminal cuts the line at its end.
        figures = [f"eta {duration(self._remaining.after(step))}", *_figures(row)]
        self._bar.set_description_str("  ".join(figures), refresh=False)
        self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        self._bar.write(text, file=self._stream)
        self._stream.flush()

    def close(self) -> None:
        if not self._bar.disable:
            self._bar.refresh()  # the last steps may lie within mininterval
        self._bar.close()


class LineProgress:
    """One plain line every `interval` steps and at the last step."""

    def __init__(self, total_steps: int, interval: int, stream: TextIO) -> None:
        self._total_steps = total_steps
        self._interval = interval
        self._stream = stream
        self._remaining = RemainingTime(total_steps)

    def update(self, row: Row) -> None:
        step = int(row["step"])
        eta_seconds = self._remaining.after(step)
        if step % self._interval == 0 or step == self._total_steps:
            position = f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"
            figures = [position, *_figures(row), f"eta {duration(eta_seconds)}"]
            figures.insert(3, f"grad_norm {row['grad_norm']:.2f}")
            self.note("  ".join(figures))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class NoProgress:
    """Shows nothing."""

    def update(self, row: Row) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class RemainingTime:
    """Estimates wall-clock seconds until the last step, from recent steps and the time between them."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._num_updates = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS + 1)  # (step, when it ended)

    def after(self, step: int) -> float:
        """Return the seconds left after `step`, which has just ended; NaN while a single step is known."""
        self._num_updates += 1
        if self._recent and step <= self._recent[-1][0]:
            self._recent.clear()  # rewound to an earlier checkpoint
        self._recent.append((step, self._clock()))
        # The first steps allocate and compile: during warm-up only the newest counts, afterwards none of
        # them.
        if self._num_updates <= WARM_UP_STEPS and len(self._recent) > 2:
            self._recent.popleft()
        (oldest_step, oldest_time), (newest_step, newest_time) = self._recent[0], self._recent[-1]
        left = self._total_steps - step
        if newest_step == oldest_step:
            return float("nan") if left else 0.0
        return left * (newest_time - oldest_time) / (newest_step - oldest_step)


def _has_no_width(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal of 0 columns, as in some containers: no bar would fit."""
    try:
        return os.get_terminal_size(stream.fileno()).columns == 0
    except OSError:  # not a terminal at all
        return False


def _figures(row: Row) -> list[str]:
    """Return the figures of a training row, each as `name value`."""
    figures = [
        f"loss {row['loss']:.3f}",
        f"lr {row['learning_rate']:.1e}",
        rate(row["tokens_per_second"]),
    ]
    if "mfu" in row:
        figures.append(f"mfu {row['mfu']:.1%}")
    return figures

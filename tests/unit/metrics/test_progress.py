"""What the user sees: under a pseudo-terminal, in a pipe, and the time that is left."""

import io
import math
import os
import pty
import re
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distllm.metrics.progress import NoProgress, RemainingTime, make_progress

RUN = """
import sys
from distllm.metrics.progress import make_progress
kind, first_step = sys.argv[1], int(sys.argv[2])
progress = make_progress(kind, total_steps=30, first_step=first_step, interval=10)
for step in range(first_step + 1, 31):
    progress.update({"step": step, "loss": 3.2144, "learning_rate": 2.9e-4, "grad_norm": 0.812,
                     "tokens_per_second": 12345.6, "mfu": 0.412})
    if step == 20:
        progress.note("step 20: validation loss 3.300")
progress.close()
print("after", file=sys.stderr)
"""
ROOT = Path(__file__).parents[3]


def run(kind: str, first_step: int, stderr: int, **environment: str) -> str:
    """Run a short training display in a process of its own, and give back its standard output."""
    command = [sys.executable, "-c", RUN, kind, str(first_step)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, env=variables, check=True
    ).stdout.decode()


def on_terminal(kind: str, first_step: int = 0, columns: int = 120, **environment: str) -> str:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    # Read while the display draws: a terminal holds few bytes, and writing into a full one blocks for good.
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(read_until_hangup, leader)
        try:
            assert run(kind, first_step, follower, **environment) == ""
        finally:
            os.close(follower)
    os.close(leader)
    return text.result().decode()


def read_until_hangup(descriptor: int) -> bytes:
    received = b""
    while True:
        try:
            received += os.read(descriptor, 4096)
        except OSError:  # Linux says EIO once the other end of a pseudo-terminal is closed
            return received


def in_pipe(kind: str, first_step: int = 0) -> str:
    reader, writer = os.pipe()
    try:
        assert run(kind, first_step, writer) == ""
    finally:
        os.close(writer)
    with os.fdopen(reader) as file:
        return file.read()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end: what follows a carriage return overwrites."""
    lines = []
    for raw in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for piece in raw.split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize("columns", [120, 80, 0])
def test_a_terminal_gets_a_bar_that_ends_complete_below_the_note(columns: int) -> None:
    note, bar, after, rest = screen(on_terminal("auto", columns=columns))
    assert note == "step 20: validation loss 3.300"
    figures = r"30/30  eta 0\.0s  loss 3\.214  lr 2\.9e-04  12\.3k tok/s  mfu 41\.2%"
    assert re.fullmatch(rf"100%\|\S+\| {figures}", bar)
    assert len(bar) <= (columns or 100)
    assert (after, rest) == ("after", "")


def test_a_narrow_terminal_cuts_the_bar_to_one_line() -> None:
    note, bar, after, _ = screen(on_terminal("auto", columns=50))
    assert len(bar) <= 50
    assert "30/30  eta 0.0s  loss 3.214" in bar
    assert (note, after) == ("step 20: validation loss 3.300", "after")


def test_a_resumed_bar_starts_where_the_run_does() -> None:
    first = on_terminal("bar", first_step=15).strip("\r").split("\r")[0]
    assert " 50%|" in first
    assert "15/30" in first


def test_a_dumb_terminal_gets_lines() -> None:
    assert on_terminal("auto", TERM="dumb").startswith("step 10/30  loss")


def test_a_pipe_gets_plain_lines() -> None:
    lines = in_pipe("auto").splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 10/30",
        "step 20/30",
        "step 20: validation loss 3.300",
        "step 30/30",
        "after",
    ]
    figures = "loss 3.214  lr 2.9e-04  grad_norm 0.81  12.3k tok/s  mfu 41.2%  eta "
    assert all(figures in line for line in lines if line.startswith("step ") and "/" in line)
    assert "\r" not in "".join(lines)


def test_none_says_nothing() -> None:
    assert in_pipe("none") == "after\n"


def test_the_last_step_has_its_line_whatever_the_interval() -> None:
    stream = io.StringIO()
    progress = make_progress("lines", total_steps=7, first_step=0, interval=5, stream=stream)
    row = {"loss": math.nan, "learning_rate": 0.0, "grad_norm": math.inf, "tokens_per_second": 5.0}
    for step in range(1, 8):
        progress.update({"step": step, **row})
    progress.close()
    five, seven = stream.getvalue().splitlines()
    assert five.startswith("step 5/7  loss nan  lr 0.0e+00  grad_norm inf  5 tok/s  eta ")
    assert seven.startswith("step 7/7")
    assert seven.endswith("eta 0.0s")


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    stream = io.StringIO()
    make_progress("auto", total_steps=1, first_step=0, interval=1, stream=stream).note("hello")
    assert stream.getvalue() == "hello\n"
    assert isinstance(make_progress("none", total_steps=1, first_step=0, interval=1), NoProgress)


def remaining(step_seconds: list[float], total_steps: int, first_step: int = 0) -> list[float]:
    now = 0.0
    clock = RemainingTime(total_steps, clock=lambda: now)
    left = []
    for step, seconds in enumerate(step_seconds, first_step + 1):
        now += seconds
        left.append(clock.after(step))
    return left


def test_warm_up_steps_do_not_distort_the_remaining_time() -> None:
    left = remaining([60.0, 30.0, 10.0] + [1.0] * 17, total_steps=100)
    assert math.isnan(left[0])
    assert left[3:] == pytest.approx([100 - step for step in range(4, 21)])


def test_remaining_time_follows_recent_steps_and_counts_what_lies_between() -> None:
    assert remaining([1.0] * 200 + [3.0] * 150, total_steps=1000)[-1] == pytest.approx(650 * 3.0)
    every_tenth_validates = [1.0 + (step % 10 == 0) * 5.0 for step in range(1, 201)]
    assert remaining(every_tenth_validates, total_steps=300)[-1] == pytest.approx(100 * 1.5)


def test_remaining_time_of_a_resumed_run_knows_only_its_own_steps() -> None:
    assert remaining([9.0, 2.0, 2.0], total_steps=50, first_step=40)[-1] == pytest.approx(7 * 2.0)


def test_remaining_time_after_a_rewind_is_never_negative() -> None:
    now = 0.0
    clock = RemainingTime(20, clock=lambda: now)
    left = []
    for step in (*range(1, 11), 5, 6, 7):
        now += 2.0
        left.append(clock.after(step))
    assert math.isnan(left[10])
    assert left[11:] == pytest.approx([14 * 2.0, 13 * 2.0])

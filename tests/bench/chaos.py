"""A run whose ranks are killed at random: what it still gets done.

    python tests/bench/chaos.py --minutes 10 --kill-every 20 [--json FILE]

Four ranks (ZeRO 2, pipeline 2 x data 2) under launch/torchrun.sh; about every `--kill-every` seconds a random
rank gets SIGKILL. Prints goodput and, as torchft does, steps committed of steps attempted. Afterwards the run
must have each step once, every number bit for bit as without kills, and no start may begin before a
checkpoint that was complete.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from commands import ROOT, environment
from runs import SMALL_RUN, curve, events, read_rows, status, write_corpus

from distllm.metrics.goodput import account, describe
from distllm.runtime.heartbeat import read_beats

STEP_SECONDS = 0.25  # slept in each step: a small model alone would be done at once
NUM_RANKS = 4


def arguments(run: str, steps: int, *overrides: str) -> list[str]:
    return [
        *("-m", "distllm", "train", *SMALL_RUN, "optimizer.lr=0.001", "zero.stage=2", "parallel.pipeline=2"),
        *(f"train.steps={steps}", "checkpoint.interval=4", "checkpoint.keep=2", f"run.dir={run}", *overrides),
    ]


def start(folder: Path, run: str, steps: int, *overrides: str) -> subprocess.Popen[bytes]:
    launcher = [str(ROOT / "launch" / "torchrun.sh"), f"--nproc-per-node={NUM_RANKS}", "--max-restarts=10000"]
    with open(folder / f"{run}.log", "wb") as log:
        return subprocess.Popen(
            [*launcher, *arguments(run, steps, *overrides)],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
        )


def live_ranks(run: Path) -> list[int]:
    """pids, from the heartbeats."""
    pids = []
    for beat in read_beats(run).values():
        with suppress(OSError):
            os.kill(beat.pid, 0)
            pids.append(beat.pid)
    return pids


def kill_at_random(process: subprocess.Popen[bytes], run: Path, kill_every: float, deadline: float) -> int:
    """Until the run ends or the deadline (monotonic) is over; returns the number of kills."""
    generator, kills = random.Random(1), 0
    next_kill = time.monotonic() + kill_every
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        pids = live_ranks(run)
        if time.monotonic() >= next_kill and len(pids) == NUM_RANKS:
            os.kill(generator.choice(pids), signal.SIGKILL)
            kills += 1
            next_kill = time.monotonic() + kill_every * generator.uniform(0.5, 1.5)
    return kills


def measure(folder: Path, minutes: float, kill_every: float) -> dict[str, Any]:
    """Runs with kills for `minutes`, then to its end without; checks it against a run without any."""
    steps = round(0.6 * minutes * 60 / STEP_SECONDS)
    write_corpus(folder)
    reference = start(folder, "reference", steps)
    assert reference.wait() == 0, (folder / "reference.log").read_text()[-4000:]

    run, began = folder / "chaos", time.monotonic()
    slow = f"fault.inject=['sleep:seconds={STEP_SECONDS},times=0']"
    process = start(folder, "chaos", steps, slow)
    try:
        kills = kill_at_random(process, run, kill_every, began + 60 * minutes)
        assert process.wait(timeout=60 * minutes) == 0, (folder / "chaos.log").read_text()[-4000:]
    finally:
        process.kill()
    assert status(run)["state"] == "completed"
    assert curve(run) == curve(folder / "reference"), "a step is missing, twice there, or another"
    assert_no_committed_step_is_lost(events(run))
    found = account(events(run), read_rows(run), (run / "metrics.jsonl").stat().st_mtime)
    print(describe(found))
    attempted = found.steps + found.lost_steps + kills  # a kill cuts off the step that was under way
    return {
        "ranks": NUM_RANKS,
        "seconds": round(time.monotonic() - began, 1),
        "kills": kills,
        "starts": found.starts,
        "steps_committed": found.steps,
        "steps_attempted": attempted,
        "committed_share": round(found.steps / attempted, 4),
        "goodput": round(found.goodput, 4),
        "seconds_by_kind": {
            kind: round(getattr(found, kind), 1)
            for kind in ("productive", "start_up", "checkpoints", "lost", "waiting", "other")
        },
    }


def assert_no_committed_step_is_lost(history: list[dict[str, Any]]) -> None:
    """Every start begins at or after the newest checkpoint that was reported complete before it."""
    newest = 0
    for event in history:
        if event["kind"] == "checkpoint":
            newest = event["step"]
        elif event["kind"] == "start":
            assert event["step"] >= newest, f"a start at step {event['step']} after a checkpoint of {newest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        result = measure(Path(folder), options.minutes, options.kill_every)
    print(
        f"{result['kills']} kills in {result['seconds']:.0f} s: {result['steps_committed']} steps committed "
        f"of {result['steps_attempted']} attempted ({100 * result['committed_share']:.1f}%)"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

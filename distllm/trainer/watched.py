"""Training under the eyes of the watchdog, whose findings go to the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distllm.config.schema import Config
from distllm.runtime.activity import Activity
from distllm.runtime.dist import Runtime
from distllm.runtime.watchdog import Reports, Watchdog
from distllm.trainer.reporter import Reporter


@contextmanager
def watched(config: Config, runtime: Runtime, activity: Activity, reporter: Reporter) -> Iterator[None]:
    """Ends the process from a thread of its own when `fault.hang_seconds` pass without progress inside."""

    def hang(verdict: str, file: Path) -> None:  # on whichever rank is the first that lives
        with suppress(OSError):
            reporter.run.event("hang", verdict, step=activity.step, file=str(file))
            reporter.run.write_status("failed", f"hang: {verdict}", step=activity.step)
        print(f"distllm: {verdict}: {file}", flush=True)

    def straggler(rank: int, facts: dict[str, Any]) -> None:
        reporter.event("straggler", f"rank {rank} holds the others up", rank=rank, **facts)
        reporter.warn(f"rank {rank} on {facts['host']} is slow: {facts['times_the_median']} x the median")

    watchdog = Watchdog(
        activity,
        Path(config.run.dir),
        runtime.rank,
        runtime.world_size,
        config.fault.hang_seconds,
        Reports(hang, straggler),
    )
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()

"""Detects hangs, reports the cause, and ends the job so that its launcher restarts it.

It is a thread beside training on every rank. Its deadline depends on no collective, store or peer; it knows
other ranks only by their files. A training thread that holds the interpreter's lock blocks this thread too:
for that there is `faulthandler`, whose deadline runs without the interpreter.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from distllm.runtime.activity import Activity, collective_of, main_thread_frames
from distllm.runtime.diagnosis import Diagnosis, judge, stragglers
from distllm.runtime.heartbeat import (
    BEAT_SECONDS,
    FOLDER,
    STALE_SECONDS,
    Beat,
    age_seconds,
    beat_path,
    read_beats,
    write_beat,
)

EXIT_HANG = 1
SAMPLE_SECONDS = 0.02  # between two samples of the training thread's stack
STRAGGLER_SECONDS = 5.0  # between two checks of the other ranks by rank 0


@dataclass(frozen=True)
class Reports:
    """Callbacks for the watchdog's findings: hang(diagnosis, step, file), straggler(rank, facts)."""

    hang: Callable[[str, int, Path], None]
    straggler: Callable[[int, dict[str, Any]], None]


@contextmanager
def watched(
    activity: Activity, run_dir: Path, rank: int, world_size: int, hang_seconds: float, reports: Reports
) -> Iterator[None]:
    """End the process from a separate thread when `hang_seconds` pass without progress inside."""
    watchdog = Watchdog(activity, run_dir, rank, world_size, hang_seconds, reports)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class Watchdog:
    """Runs from `start` to `stop`; at the deadline it never returns: the process ends."""

    def __init__(
        self,
        activity: Activity,
        run_dir: Path,
        rank: int,
        world_size: int,
        hang_seconds: float,
        reports: Reports,
    ) -> None:
        self._activity = activity
        self._run_dir = run_dir
        self._rank = rank
        self._world_size = world_size
        self._hang_seconds = hang_seconds
        self._reports = reports
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._busy = BusyTime()
        self._named: set[int] = set()
        self._stack_file: TextIO | None = None

    def start(self) -> None:
        (self._run_dir / FOLDER).mkdir(exist_ok=True)
        self._stack_file = open(beat_path(self._run_dir, self._rank).with_suffix(".stack"), "w")  # noqa: SIM115
        self._activity.progressed_at = time.monotonic()
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: the job ends by itself."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=5)
        if self._stack_file:
            self._stack_file.close()
        for suffix in (".json", ".stack"):
            beat_path(self._run_dir, self._rank).with_suffix(suffix).unlink(missing_ok=True)
        with suppress(OSError):  # the last rank to leave finds it empty
            (self._run_dir / FOLDER).rmdir()

    def _run(self) -> None:
        next_beat, next_look = 0.0, time.monotonic() + STRAGGLER_SECONDS
        while not self._stopped.wait(SAMPLE_SECONDS):
            is_busy = collective_of(main_thread_frames()) is None
            self._busy.sample(self._activity.step, is_busy)
            if time.monotonic() < next_beat:
                continue
            next_beat = time.monotonic() + BEAT_SECONDS
            patience = max(self._hang_seconds, self._activity.patience_seconds)
            if self._activity.idle_seconds > patience:
                self._end()
            self._beat()
            # Longer than our own deadline, whose report is better when it can run: it covers all ranks.
            faulthandler.dump_traceback_later(
                patience + 2 * STALE_SECONDS, exit=True, file=self._stack_file or 2
            )
            if self._rank == 0 and time.monotonic() > next_look:
                next_look = time.monotonic() + STRAGGLER_SECONDS
                self._look_for_stragglers()

    def _beat(self, is_last: bool = False) -> None:
        frames = main_thread_frames()
        activity = self._activity
        beat = Beat(
            rank=self._rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            time=time.time(),
            step=activity.step,
            microbatch=activity.microbatch,
            samples=activity.samples,
            phase=activity.phase,
            idle_seconds=round(activity.idle_seconds, 1),
            collective=collective_of(frames),
            busy_seconds=round(self._busy.per_step, 4),
            stack=tuple(map(str, frames)) if is_last else (),
            flight_recorder=nccl_flight_recorder() if is_last else None,
        )
        with suppress(OSError):  # a full disk is no hang
            write_beat(self._run_dir, beat)

    def _end(self) -> None:
        """Write what this rank was doing, wait for the others' reports, and let one rank diagnose."""
        self._beat(is_last=True)
        deadline = time.monotonic() + STALE_SECONDS + BEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS)
            self._beat(is_last=True)
        file = self._run_dir / f"hang_{self._activity.step}.json"
        beats = read_beats(self._run_dir, self._world_size)
        ages = {rank: age_seconds(beat_path(self._run_dir, rank)) for rank in beats}
        diagnosis = judge(beats, ages, self._world_size)
        alive = [rank for rank in sorted(ages) if ages[rank] <= STALE_SECONDS]
        if alive and self._rank == alive[0]:
            self._write(file, diagnosis, beats, ages)
            for rank in diagnosis.suspects:
                _kill_if_stopped(beats.get(rank))
        else:
            time.sleep(BEAT_SECONDS)  # the first rank to end ends all, before the file is written
        os._exit(EXIT_HANG)

    def _write(
        self, file: Path, diagnosis: Diagnosis, beats: dict[int, Beat], ages: dict[int, float]
    ) -> None:
        content = {
            "suspects": diagnosis.suspects,
            "reason": diagnosis.reason,
            "hang_seconds": self._hang_seconds,
            "ranks": {
                rank: asdict(beat) | {"seconds_since_last_sign": round(ages[rank], 1)}
                for rank, beat in beats.items()
            },
        }
        with suppress(OSError):
            file.write_text(json.dumps(content, indent=1))
        suspects = ", ".join(map(str, diagnosis.suspects)) or "none"
        told = f"no progress for {self._hang_seconds:g} s; suspects: {suspects} ({diagnosis.reason})"
        self._reports.hang(told, self._activity.step, file)

    def _look_for_stragglers(self) -> None:
        beats = read_beats(self._run_dir, self._world_size)
        slow = stragglers({rank: beat for rank, beat in beats.items() if beat.busy_seconds})
        for rank, factor in slow.items():
            if rank not in self._named:
                facts = {
                    "host": beats[rank].host,
                    "busy_seconds": beats[rank].busy_seconds,
                    "times_the_median": round(factor, 2),
                }
                self._reports.straggler(rank, facts)
        self._named = set(slow)


class BusyTime:
    """Measures seconds per step outside of communication, from samples of the training thread's stack."""

    def __init__(self) -> None:
        self.per_step = 0.0
        self._step = -1
        self._seconds = 0.0
        self._last = time.monotonic()

    def sample(self, step: int, is_busy: bool) -> None:
        elapsed, self._last = time.monotonic() - self._last, time.monotonic()
        if step != self._step:
            num_steps = max(1, step - self._step)
            if self._step >= 0:
                mean = self._seconds / num_steps
                self.per_step = mean if not self.per_step else 0.8 * self.per_step + 0.2 * mean
            self._step, self._seconds = step, 0.0
        self._seconds += elapsed * is_busy


def nccl_flight_recorder() -> Any:
    """Return NCCL's last collectives, which dist.start has asked it to record; None without NCCL."""
    import torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return None
    try:
        import pickle

        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

        trace = pickle.loads(
            _dump_nccl_trace(includeCollectives=True, includeStackTraces=False, onlyActive=False)
        )
        keep = ("collective_seq_id", "p2p_seq_id", "profiling_name", "state", "input_sizes", "process_group")
        return [{key: entry.get(key) for key in keep} for entry in trace.get("entries", [])[-20:]]
    except Exception as error:  # it must not keep the diagnosis from being written
        return repr(error)


def _kill_if_stopped(beat: Beat | None) -> None:
    """Kill a stopped process: it ignores the agent's SIGTERM, and the agent waits 30 s before it kills."""
    if beat is None or beat.host != socket.gethostname():
        return
    try:
        state = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in ("T", "t"):
            os.kill(beat.pid, signal.SIGKILL)
    except OSError:
        return

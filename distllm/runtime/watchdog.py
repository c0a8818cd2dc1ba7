"""Ends a job that cannot go on, and names the cause: a hang, a rank that failed, a stop that nobody heeds.

It is a thread beside training on every rank. Its deadlines depend on no collective, store or peer; it knows
other ranks only by their files. A training thread that holds the interpreter's lock blocks this thread too:
for that there is `faulthandler`, whose deadline runs without the interpreter and which prints to the rank's
standard error.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from distllm.config.problems import EXIT_PREEMPTED, UserError
from distllm.runtime.activity import Activity, collective_of, main_thread_frames
from distllm.runtime.busy_time import BusyTime, busy_seconds
from distllm.runtime.cause import Cause, Notice, describe
from distllm.runtime.diagnosis import Diagnosis, stragglers
from distllm.runtime.ending import CLEANUP_SECONDS, EXIT_FAILED, end_process, end_within, exit_code_of
from distllm.runtime.flight_recorder import nccl_flight_recorder
from distllm.runtime.heartbeat import (
    Beat,
    BeatWriter,
    beat_seconds,
    new_folder,
    read_records,
    remove_folder,
    stale_seconds,
)
from distllm.runtime.launcher import is_under_agent
from distllm.runtime.signals import StopRequest, seconds_to_stop
from distllm.runtime.verdict import find_verdict, kill_if_stopped

EXIT_HANG = EXIT_FAILED
SAMPLE_SECONDS = 0.02  # between two samples of the training thread's stack
STRAGGLER_BEATS = 5  # between two checks of the other ranks by rank 0
LEAVE_SECONDS = 2.0  # that a training thread has to end by itself once the cause is known
LAST_IN_LINE = 8  # ranks from here on become judge at the same time, and only if no earlier one did


@dataclass(frozen=True)
class Reports:
    """Callbacks for the watchdog's findings.

    hang(diagnosis, step, file), failed(reason, step): on the one rank that names the cause.
    straggler(rank, facts): on rank 0.
    """

    hang: Callable[[str, int, Path], None]
    failed: Callable[[str, int], None]
    straggler: Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """The place of a rank. folder: of the heartbeats of this start, from `prepare_folder`."""

    run_dir: Path
    folder: Path
    rank: int
    local_rank: int
    world_size: int


def prepare_folder(run_dir: Path) -> Path:
    """Make the folder of the heartbeats of this start; on one rank, before any watchdog starts."""
    folder = new_folder(run_dir)
    Notice(folder).prepare()
    return folder


class Watchdog:
    """Runs from `start` to `stop`; at a deadline it never returns: the process ends."""

    def __init__(
        self,
        activity: Activity,
        place: Place,
        hang_seconds: float,
        grace_seconds: float,
        stop_request: StopRequest,
        reports: Reports,
    ) -> None:
        self._activity = activity
        self._place = place
        self._hang_seconds = hang_seconds
        self._grace_seconds = grace_seconds
        self._stop_request = stop_request
        self._reports = reports
        self._beat_seconds = beat_seconds(place.world_size)
        self._stale_seconds = stale_seconds(place.world_size)
        self._writer = BeatWriter(place.folder, place.rank, place.local_rank)
        self._notice = Notice(place.folder)
        self._busy = BusyTime()
        self._named: set[int] = set()
        self._is_ending = self._has_said = self._is_armed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._activity.progressed_at = time.monotonic()
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: the job has succeeded and ends by itself."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join(timeout=5)
        if self._place.rank == 0:
            remove_folder(self._place.folder)

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others what ends this rank, so that they end too; return what to raise instead of it.

        Called by the training thread. The error is printed here, unless `__main__` has another way to show
        it. Where another rank, or this one's watchdog, has named a cause already, the error follows from that
        and is not shown. Where there are other ranks the watchdog goes on. If cleaning up takes too long,
        this process is ended.
        """
        is_shown_elsewhere = isinstance(error, UserError | KeyboardInterrupt)
        if self._place.world_size == 1:
            self._reports.failed(describe(error), self._activity.step)
            self.stop()
            end_within(CLEANUP_SECONDS, exit_code_of(error))
            return error
        self._has_said |= is_shown_elsewhere
        if not self._is_ending and self._notice.claim():
            cause = self._own_cause(describe(error), exit_code_of(error))
            self._has_said = True
            if not is_shown_elsewhere:
                traceback.print_exception(error)
            self._tell(cause)
        elif not is_shown_elsewhere:
            # A judge claims before it looks; a rank that fails tells at once.
            self._say(self._notice.wait(2 * self._stale_seconds + self._beat_seconds))
        return error if is_shown_elsewhere else SystemExit(exit_code_of(error))

    def _run(self) -> None:
        now = time.monotonic()
        next_beat, next_look = 0.0, now + STRAGGLER_BEATS * self._beat_seconds
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._busy.sample(self._activity.step, collective_of(main_thread_frames()) is None)
            patience = max(self._hang_seconds, self._activity.patience_seconds)
            if self._is_armed == math.isinf(patience):
                self._arm_faulthandler(patience)  # at once: after the next step this thread may not run again
            if (now := time.monotonic()) < next_beat:
                continue
            next_beat = now + self._beat_seconds
            self._end_with_others()
            if self._activity.idle_seconds > patience:
                self._end_hang()
            self._end_if_asked_in_vain()
            self._beat()
            self._arm_faulthandler(patience)
            if self._place.rank == 0 and now > next_look:
                next_look = now + STRAGGLER_BEATS * self._beat_seconds
                self._look_for_stragglers()

    def _arm_faulthandler(self, patience: float) -> None:
        """Set the deadline that needs no interpreter: after our own, whose report covers all ranks."""
        self._is_armed = not math.isinf(patience)
        if not self._is_armed:
            faulthandler.cancel_dump_traceback_later()
        else:
            until_verdict = self._stale_seconds + (LAST_IN_LINE + 4) * self._beat_seconds
            faulthandler.dump_traceback_later(patience + until_verdict, exit=True, file=2)

    def _beat(self, beat: Beat | None = None) -> None:
        with suppress(OSError):  # a full disk is no hang
            self._writer.write(beat or self._report())

    def _report(self, is_last: bool = False) -> Beat:
        frames, activity = main_thread_frames(), self._activity
        return Beat(
            rank=self._place.rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            time=time.time(),
            step=activity.step,
            microbatch=activity.microbatch,
            samples=activity.samples,
            phase=activity.phase,
            idle_seconds=round(activity.idle_seconds, 1),
            collective=collective_of(frames),
            busy_seconds=round(busy_seconds(activity.device_seconds, self._busy.per_step), 4),
            stack=tuple(map(str, frames)) if is_last else (),
            flight_recorder=nccl_flight_recorder() if is_last else None,
        )

    def _own_cause(self, what: str, exit_code: int) -> Cause:
        rank = self._place.rank
        reason = what if self._place.world_size == 1 else f"rank {rank} failed: {what}"
        return Cause(rank, reason, exit_code)

    def _tell(self, cause: Cause) -> None:
        """Tell a cause that this rank has claimed."""
        self._notice.tell(cause)
        self._reports.failed(cause.reason, self._activity.step)

    def _say(self, cause: Cause | None) -> None:
        """Say on rank 0, once, why it ends, if that is another rank's doing."""
        if self._place.rank == 0 and not self._has_said and cause and cause.rank != 0:
            self._has_said = True
            print(f"distllm: {cause.reason}; ending", file=sys.stderr, flush=True)

    def _end_with_others(self) -> None:
        """End if any rank has told why the job ends; also if this rank did, and cannot leave."""
        if cause := self._notice.read():
            self._is_ending = True
            time.sleep(LEAVE_SECONDS)
            self._say(cause)
            end_process(cause.exit_code)

    def _end_if_asked_in_vain(self) -> None:
        """End if the signal to stop came and no step ends: not even the wish reaches the other ranks."""
        asked_for, activity = self._stop_request.seconds_since, self._activity
        if asked_for is None or activity.phase != "train":
            return
        patience = seconds_to_stop(activity.step_seconds, self._grace_seconds)
        if min(asked_for, activity.idle_seconds) <= patience:
            return
        if self._notice.claim():
            what = f"asked to stop by {self._stop_request.reason}, but no step ended within {patience:.0f} s"
            self._has_said = True
            print(f"distllm: rank {self._place.rank}: {what}; ending", file=sys.stderr, flush=True)
            code = 0 if is_under_agent() else EXIT_PREEMPTED
            self._tell(Cause(self._place.rank, what, code))
            end_process(code)

    def _end_hang(self) -> NoReturn:
        """Report what this rank was doing; judge, if it is the first; end with the verdict."""
        self._is_ending = True
        last = self._report(is_last=True)
        turns = min(self._place.rank, LAST_IN_LINE)
        self._beat_on(last, turns * self._beat_seconds, lambda: self._notice.is_claimed)
        if self._notice.claim():
            before = read_records(self._place.folder)
            self._beat_on(last, self._stale_seconds + self._beat_seconds)
            self._write_verdict({rank: record.count for rank, record in before.items()})
        else:
            bound = 3 * self._stale_seconds
            self._beat_on(last, bound, lambda: self._notice.read() is not None)
            self._say(self._notice.read())
        end_process(EXIT_HANG)

    def _beat_on(self, beat: Beat, seconds: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Write the same beat again and again, as a sign of life, until the time or something is over."""
        deadline = time.monotonic() + seconds
        self._beat(beat)
        while time.monotonic() < deadline and not is_over():
            time.sleep(min(self._beat_seconds, max(0.0, deadline - time.monotonic())))
            self._beat(beat)

    def _write_verdict(self, counts: dict[int, int]) -> None:
        place, step = self._place, self._activity.step
        file = place.run_dir / f"hang_{step}.json"
        verdict = find_verdict(read_records(place.folder), counts, place.world_size, self._stale_seconds)
        with suppress(OSError):
            file.write_text(verdict.to_json(self._hang_seconds))
        told = _describe_hang(verdict.diagnosis, self._hang_seconds)
        self._reports.hang(told, step, file)
        for rank in verdict.diagnosis.suspects:
            kill_if_stopped(verdict.beats.get(rank))
        self._notice.tell(Cause(place.rank, told, EXIT_HANG))

    def _look_for_stragglers(self) -> None:
        records = read_records(self._place.folder)
        slow = stragglers({r: record.busy_seconds for r, record in records.items() if record.busy_seconds})
        for rank, factor in slow.items():
            if rank not in self._named:
                facts = {
                    "host": records[rank].beat().host,
                    "busy_seconds": records[rank].busy_seconds,
                    "times_the_median": round(factor, 2),
                }
                self._reports.straggler(rank, facts)
        self._named = set(slow)


def _describe_hang(diagnosis: Diagnosis, hang_seconds: float) -> str:
    named = diagnosis.suspects[:16]
    more = f" and {len(diagnosis.suspects) - 16} more" if len(diagnosis.suspects) > 16 else ""
    suspects = ", ".join(map(str, named)) + more or "none"
    return f"no progress for {hang_seconds:g} s; suspects: {suspects} ({diagnosis.reason})"

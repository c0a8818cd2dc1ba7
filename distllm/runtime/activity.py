"""The current activity of this rank, written by the training thread and read by the watchdog's."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Generic, TypeVar

from distllm.runtime.busy_time import averaged

Item = TypeVar("Item")
MAIN_THREAD = threading.main_thread().ident or 0
WAITING_FOLDERS = ("/torch/distributed/", "/deepspeed/comm/")
WAITING_FILES = "/pipeline_parallel/p2p_communication.py"


@dataclass
class Activity:
    """The state of the training thread.

    step: updates done.
    samples: [first, end) of the step.
    microbatch: the last one that was begun.
    phase: the trainer's current work, such as "train" or "validate".
    progressed_at: monotonic seconds of the last sign of progress.
    patience_seconds: how long the phase may take without one, if that is longer than usual. Before the first
        step it may take any time: models are built and checkpoints read.
    step_seconds: of the last step.
    device_seconds: per step, that the device worked for this rank alone, averaged; 0 without a device.

    Plain attributes without a lock: the reader may see one newer than another, which does not matter.
    """

    step: int = 0
    samples: tuple[int, int] = (0, 0)
    microbatch: int = -1
    phase: str = "start"
    progressed_at: float = field(default_factory=time.monotonic)
    patience_seconds: float = math.inf
    step_seconds: float = 0.0
    device_seconds: float = 0.0
    _began_at: float = field(default_factory=time.monotonic)

    def begin(
        self, phase: str, step: int, samples: tuple[int, int] = (0, 0), patience_seconds: float = 0.0
    ) -> None:
        now = time.monotonic()
        if self.phase == "train":
            self.step_seconds = now - self._began_at
        self.phase, self.step, self.samples, self.microbatch = phase, step, samples, -1
        self.patience_seconds = patience_seconds
        self.progressed_at = self._began_at = now

    def note_device_seconds(self, seconds: float) -> None:
        """Note for how long the device worked in a step."""
        self.device_seconds = averaged(self.device_seconds, seconds)

    @contextmanager
    def patient(self, phase: str, seconds: float) -> Iterator[None]:
        """Allow the work inside, which shows no progress on the way, to take so many seconds."""
        self.begin(phase, self.step, patience_seconds=seconds)
        try:
            yield
        finally:
            self.begin("between steps", self.step)

    def begin_microbatch(self, index: int) -> None:
        self.microbatch = index
        self.progressed_at = time.monotonic()

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self.progressed_at


class Noted(Sequence[Item], Generic[Item]):
    """A list of microbatches that records in the activity which of them is read."""

    def __init__(self, items: Sequence[Item], activity: Activity) -> None:
        self._items, self._activity = items, activity

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice
        return self._items[index]

    def __iter__(self) -> Iterator[Item]:
        for index, item in enumerate(self._items):
            self._activity.begin_microbatch(index)
            yield item


@dataclass(frozen=True)
class Frame:
    """A frame of the training thread."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


def main_thread_frames() -> list[Frame]:
    """Return the training thread's stack, innermost frame first. Cheap: no source is read."""
    frame: FrameType | None = sys._current_frames().get(MAIN_THREAD)
    frames = []
    while frame:
        frames.append(Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames


def collective_of(frames: Sequence[Frame]) -> str | None:
    """Return the collective or message that the training thread waits for; None if it does other work.

    gloo's calls block in these files. With NCCL the thread waits where a result is read, which the engine
    does in `wait_for_verdict`; waits of autograd's own threads are not seen.
    """
    for depth, frame in enumerate(frames[:8]):
        if frame.file.endswith(WAITING_FILES) or any(part in frame.file for part in WAITING_FOLDERS):
            outer = [p.function for p in frames[depth:] if any(part in p.file for part in WAITING_FOLDERS)]
            named = [function for function in outer if function != "wrapper"]
            return named[-1] if named else frame.function
        if frame.function == "wait_for_verdict":
            return "loss and gradient norm of the step"
    return None

"""Peak of the memory that a process has of its own, beside files that it has mapped (Linux)."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import TracebackType

SAMPLE_SECONDS = 0.002


def anonymous_bytes() -> int:
    """RssAnon of this process: what it has allocated and touched. Pages of a mapped file are not its own."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


class PeakAnonymous:
    """A block's peak above what was there before it, as sampled by a thread every 2 ms: `extra_bytes`."""

    def __enter__(self) -> PeakAnonymous:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the heap has free would hide as much of the growth
        self._before = self._peak = anonymous_bytes()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_done.set()
        self._thread.join()

    @property
    def extra_bytes(self) -> int:
        return self._peak - self._before

    def _sample(self) -> None:
        while not self._is_done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, anonymous_bytes())

"""Progress of the tokenization of a corpus, a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context

from distllm.data.preparation.pieces import Advance

PROGRESS_SECONDS = 5.0


class StoppedError(Exception):
    """The process that started this worker has asked it to stop."""


class Counters:
    """Memory that the workers share: the progress of each unit, and whether to stop.

    It has no locks, since a killed worker would never release one. Each number has a single writer.
    """

    def __init__(self, num_units: int) -> None:
        context = get_context("spawn")
        self.num_bytes = context.RawArray("q", num_units)
        self.num_tokens = context.RawArray("q", num_units)
        self.stop = context.RawValue("b", 0)

    def of_unit(self, index: int, most_bytes: int) -> Advance:
        """Return a function for the maker of piece `index`. most_bytes: of the unit's input, 0 if unknown.

        A piece may be made anew, so its count starts at 0.
        """
        self.num_bytes[index] = self.num_tokens[index] = 0

        def advance(num_bytes: int, num_tokens: int) -> None:
            done = self.num_bytes[index] + num_bytes
            self.num_bytes[index] = min(done, most_bytes) if most_bytes else done
            self.num_tokens[index] += num_tokens
            if self.stop.value:
                raise StoppedError

        return advance

    def finish(self, index: int, num_bytes: int) -> None:
        """Count a unit as done. Its text and input differ in size, so it ends with all of its share."""
        self.num_bytes[index] = max(self.num_bytes[index], num_bytes)


class Progress:
    """Reports the progress of `counters`.

    total_bytes: of the input of all units; bytes_before: of those that were tokenized by earlier processes.
    """

    def __init__(
        self, counters: Counters, total_bytes: int, bytes_before: int, report: Callable[[str], None]
    ) -> None:
        self._counters = counters
        self._total_bytes = total_bytes
        self._bytes_before = bytes_before
        self._report = report
        self._start = self._reported = time.monotonic()

    def show(self) -> None:
        """Report, if enough time has passed."""
        now = time.monotonic()
        if now - self._reported < PROGRESS_SECONDS:
            return
        self._reported = now
        seconds = now - self._start
        new_bytes, num_tokens = sum(self._counters.num_bytes), sum(self._counters.num_tokens)
        done = self._bytes_before + new_bytes
        rate = new_bytes / seconds
        left = max(0, self._total_bytes - done)
        total, remaining = "?", "?"
        if self._total_bytes:  # unknown for streamed data sets
            total = f"{self._total_bytes / 1e6:,.0f}"
            remaining = str(timedelta(seconds=round(left / rate))) if rate else "?"
        self._report(
            f"tokenized {done / 1e6:,.0f} of {total} MB, {rate / 1e6:.1f} MB/s, "
            f"{num_tokens / seconds:,.0f} tokens/s, {remaining} left"
        )

"""Arrays in files, read piece by piece.

They are read with pread and not through a memory map. The page cache serves both alike, but with a map a
failing disk or a lost file server raises SIGBUS, which kills the process without a message. Here a failed
read is retried, and then reported with its file.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

RETRY_SECONDS = (0.1, 0.5, 2.0, 8.0)  # a file server that restarts is back within that


class FileArray:
    """A one-dimensional array that begins `offset` bytes into a file; opened once, read from any thread.

    Reading raises OSError, with file and place, when the file stays unreadable or ends too early.
    """

    def __init__(self, path: Path, dtype: np.dtype | type, offset: int = 0, count: int | None = None) -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._offset = offset
        self._descriptor = os.open(path, os.O_RDONLY)
        size = os.fstat(self._descriptor).st_size
        self._count = (size - offset) // self.dtype.itemsize if count is None else count

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of elements start to stop - 1."""
        assert 0 <= start <= stop <= self._count, f"{start}:{stop} of {self._count} elements of {self.path}"
        values = np.empty(stop - start, self.dtype)
        self._fill(values.view(np.uint8).data, self._offset + start * self.dtype.itemsize)
        return values

    def at(self, index: int) -> int:
        """Return one element."""
        return int(self.read(index, index + 1)[0])

    def _fill(self, buffer: memoryview, position: int) -> None:
        done = 0
        for wait in (*RETRY_SECONDS, None):
            try:
                while done < len(buffer):
                    count = os.preadv(self._descriptor, [buffer[done:]], position + done)
                    if count == 0:
                        raise OSError(f"the file ends at byte {position + done}")
                    done += count
                return
            except OSError as error:
                if wait is None:
                    place = f"bytes {position + done} to {position + len(buffer)} of {self.path}"
                    tries = len(RETRY_SECONDS) + 1
                    raise OSError(f"{place} cannot be read, tried {tries} times: {error}") from error
                time.sleep(wait)
                self._reopen()

    def _reopen(self) -> None:
        """Open the file again by its name: a restarted file server may reject the old handle (ESTALE)."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return  # the next read raises the error
        old, self._descriptor = self._descriptor, descriptor
        os.close(old)

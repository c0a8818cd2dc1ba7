"""Saves during training: at once, or in the background from a copy in host memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distllm.checkpoint.pieces import Piece, pieces_of
from distllm.checkpoint.storage import LOCAL, Storage
from distllm.checkpoint.store import Contents, SaveFailedError, write_pieces
from distllm.layout.fragment import Fragment
from distllm.layout.save_groups import SaveGroups


@dataclass(frozen=True)
class Outcome:
    """The result of a save.

    blocking_seconds: for which training stood still.
    seconds: from its start until it was durable.
    num_bytes: that this rank wrote.
    error: why it failed; then the checkpoint does not exist.
    """

    path: Path
    step: int
    blocking_seconds: float
    seconds: float
    num_bytes: int
    error: str | None


class Saver:
    """Writes one checkpoint at a time.

    is_async: `save` returns once the rank's part is copied to host memory. The next save reuses the copy's
        memory, so there is at most one copy. A save that begins while another is being written waits for it
        first.
    """

    def __init__(self, groups: SaveGroups, is_async: bool, storage: Storage = LOCAL) -> None:
        self._groups = groups
        self.is_async = is_async
        self._storage = storage
        self._copies = _HostCopies()
        self._running: Future[Outcome] | None = None
        self._finished: list[Outcome] = []

    def save(
        self, path: Path, fragments: Iterable[Fragment], contents: Contents, after: Callable[[], None]
    ) -> None:
        """Write the current content of the fragments as `path`. Collective.

        after: called on every rank when the checkpoint exists; not when the save has failed. The result is
            among the next `outcomes`.
        """
        begin = time.monotonic()
        self.wait()
        pieces = pieces_of(fragment for fragment in fragments if fragment.writer)
        if not self.is_async:
            self._finished.append(self._write(path, pieces, contents, after, begin, None))
            return
        pieces = self._copies.copy(pieces)
        blocked = time.monotonic() - begin
        self._running = _in_background(lambda: self._write(path, pieces, contents, after, begin, blocked))

    def outcomes(self) -> list[Outcome]:
        """Return the results of saves since the last call; raise an error that the disk did not cause."""
        if self._running and self._running.done():
            self.wait()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._running:
            running, self._running = self._running, None
            self._finished.append(running.result())

    def _write(
        self,
        path: Path,
        pieces: Sequence[Piece],
        contents: Contents,
        after: Callable[[], None],
        begin: float,
        blocked: float | None,
    ) -> Outcome:
        error = None
        try:
            write_pieces(path, pieces, contents, self._groups, self._storage)
            after()
        except SaveFailedError as caught:
            error = str(caught)
        seconds = time.monotonic() - begin
        num_bytes = sum(piece.view.nbytes for piece in pieces)
        return Outcome(
            path, contents.step, seconds if blocked is None else blocked, seconds, num_bytes, error
        )


class _HostCopies:
    """Buffers in host memory, allocated once and reused, pinned where a GPU copies into them."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the same pieces with views of the copies, which are valid until the next call."""
        begins = dict.fromkeys({piece.view.dtype for piece in pieces}, 0)
        for piece in pieces:
            begins[piece.view.dtype] += piece.view.numel()
        on_gpu = any(piece.view.is_cuda for piece in pieces)
        for dtype, numel in begins.items():
            if dtype not in self._buffers or self._buffers[dtype].numel() < numel:
                self._buffers[dtype] = torch.empty(numel, dtype=dtype, pin_memory=on_gpu)
        copies = []
        begins = dict.fromkeys(begins, 0)
        for piece in pieces:
            dtype, numel = piece.view.dtype, piece.view.numel()
            view = self._buffers[dtype].narrow(0, begins[dtype], numel).view(piece.view.shape)
            view.copy_(piece.view, non_blocking=True)
            begins[dtype] += numel
            copies.append(replace(piece, view=view))
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # the next step overwrites the tensors being copied
        return copies


def _in_background(work: Callable[[], Outcome]) -> Future[Outcome]:
    """Run `work` in a daemon thread.

    Not an executor: the interpreter waits for its threads at exit, and with a dead peer a write never ends.
    """
    future: Future[Outcome] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future

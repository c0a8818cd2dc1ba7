"""Saves during training: at once, or in the background from a copy in host memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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

LARGEST_BLOCK, SMALLEST_BLOCK = 1 << 30, 1 << 20  # bytes, of pinned memory
ALIGNMENT = 64  # bytes, of each copy


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

    def reserve(self, fragments: Iterable[Fragment]) -> None:
        """Allocate the memory that `save` copies these fragments into, so that the first save need not."""
        if self.is_async:
            self._copies.reserve(pieces_of(fragment for fragment in fragments if fragment.writer))

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
    """Blocks of host memory, allocated once and reused, pinned where a GPU copies into them."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []  # bytes

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Allocate what `copy` needs for these pieces, which takes longer than the copy."""
        for _ in self._places(pieces):
            pass

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces with views of the copies, which are valid until the next call.

        A piece that crosses the end of a block is cut there.
        """
        copies = []
        for part, memory in self._places(pieces):
            memory.copy_(part.view, non_blocking=True)
            copies.append(replace(part, view=memory))
        if _on_gpu(pieces):
            torch.cuda.current_stream().synchronize()  # the next step overwrites the tensors being copied
        return copies

    def _places(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """Yield each piece or part of one with its memory; add blocks where those at hand do not suffice."""
        num_bytes = sum(piece.view.nbytes for piece in pieces) + ALIGNMENT * len(pieces)
        block_index = begin = 0
        waiting = deque(pieces)
        while waiting:
            if block_index == len(self._blocks):
                self._add_blocks(num_bytes, pinned=_on_gpu(pieces))
            block, piece = self._blocks[block_index], waiting.popleft()
            part, rest = piece.cut(max(0, block.nbytes - begin) // piece.view.element_size())
            waiting.extendleft(reversed(rest))
            if part is None:
                block_index, begin = block_index + 1, 0
                continue
            memory = block[begin : begin + part.view.nbytes].view(part.view.dtype)
            yield part, memory.view(part.view.shape)
            begin += _aligned(part.view.nbytes)
            num_bytes -= part.view.nbytes

    def _add_blocks(self, num_bytes: int, pinned: bool) -> None:
        for size in pinned_blocks(num_bytes) if pinned else [num_bytes]:
            self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=pinned))


def pinned_blocks(num_bytes: int) -> list[int]:
    """Return sizes of blocks for `num_bytes`: powers of two, since PyTorch rounds pinned memory up to one.

    Less than the smallest block is wasted; a single block would waste up to as much as it holds.
    """
    largest, rest = divmod(-(-num_bytes // SMALLEST_BLOCK) * SMALLEST_BLOCK, LARGEST_BLOCK)
    powers = (1 << bit for bit in reversed(range(LARGEST_BLOCK.bit_length())))
    return [LARGEST_BLOCK] * largest + [power for power in powers if rest & power]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _on_gpu(pieces: Sequence[Piece]) -> bool:
    return any(piece.view.is_cuda for piece in pieces)


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

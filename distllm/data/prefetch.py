"""Read ahead what the next steps will most likely ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class Prefetcher(Generic[Request, Result]):
    """Answers requests as `read` does; those that `following` expects are read in the background.

    A result that was read ahead answers only the request that it was read for. After a skipped step, a rewind
    or a change of the mixture the request differs and is read when it is made, so results do not depend on
    the depth. An error while reading is raised by the request that it belongs to.

    depth: how many requests ahead; 0 reads when asked, in the caller's thread.
    """

    def __init__(
        self,
        read: Callable[[Request], Result],
        following: Callable[[Request], Iterator[Request]],
        depth: int,
    ) -> None:
        self._read = read
        self._following = following
        self._depth = depth
        # One thread: reads are answered in the order in which steps need them.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if depth else None
        self._pending: list[tuple[Request, Future[Result]]] = []

    def get(self, request: Request) -> Result:
        if self._executor is None:
            return self._read(request)
        to_read = [request, *islice(self._following(request), self._depth)]
        for ahead, future in self._pending:
            if ahead not in to_read:
                future.cancel()
        pending = [(ahead, future) for ahead, future in self._pending if ahead in to_read]
        for ahead in to_read:
            if not any(ahead == known for known, _ in pending):
                pending.append((ahead, self._executor.submit(self._read, ahead)))
        self._pending = [(ahead, future) for ahead, future in pending if ahead != request]
        (answer,) = (future for ahead, future in pending if ahead == request)
        return answer.result()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

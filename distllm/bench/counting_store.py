"""A rendezvous store that counts the operations on another store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class CountingStore(dist.Store):
    """Passes every operation on to `store`, also those of PyTorch's C++ side, and calls `count` for each.

    Keep a reference to it as long as groups exist: they keep its C++ half only, for which every operation is
    "not implemented" once the Python half is freed.
    """

    def __init__(self, store: dist.Store, count: Callable[[], None]) -> None:
        super().__init__()
        self._store: Any = store  # PyTorch declares only a part of its operations
        self._count = count

    def set(self, key: str, value: Any) -> None:
        self._count()
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        self._count()
        return self._store.get(key)

    def add(self, key: str, amount: int) -> int:
        self._count()
        return self._store.add(key, amount)

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        self._count()
        return self._store.compare_set(key, expected, desired)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._count()
        if timeout is None:
            self._store.wait(list(keys))
        else:
            self._store.wait(list(keys), timeout)

    def check(self, keys: Sequence[str]) -> bool:
        self._count()
        return self._store.check(list(keys))

    def delete_key(self, key: str) -> bool:
        self._count()
        return self._store.delete_key(key)

    def num_keys(self) -> int:
        self._count()
        return self._store.num_keys()

    def append(self, key: str, value: Any) -> None:
        self._count()
        self._store.append(key, value)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self._count()
        return self._store.multi_get(list(keys))

    def multi_set(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        self._count()
        self._store.multi_set(list(keys), list(values))

    def clone(self) -> CountingStore:
        """Return this store, whose Python half is referenced; that of a copy would be freed."""
        return self

    def has_extended_api(self) -> bool:
        return self._store.has_extended_api()

    def set_timeout(self, timeout: timedelta) -> None:
        self._store.set_timeout(timeout)

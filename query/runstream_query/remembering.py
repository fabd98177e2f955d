"""A bounded memory: the values used last, by key, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

__all__ = ["Remembered"]

_LARGEST_SHARE: Final = 10
"""A value larger than this part of the whole is not kept: it would push out too many others."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """Any thread, several at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: K) -> V | None:
        """What was put there last, if it is still known."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, size: int) -> None:
        """Keep `value` under `key`; `size` bytes, estimated."""
        if size > self._max_bytes // _LARGEST_SHARE:
            return
        with self._lock:
            before = self._values.pop(key, None)
            self._bytes += size - (0 if before is None else before[1])
            self._values[key] = value, size
            while self._bytes > self._max_bytes:
                self._bytes -= self._values.popitem(last=False)[1][1]

"""A bounded cache that never has two values for one key at the same time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class WeakLRU(Generic[KeyT, ValueT]):
    """A cache of the most recently used values by key; older ones are found as long as somebody holds them.

    So a limit, or a budget, that is dropped while a call holds it does not exist twice. Safe to use from any thread.

    Args:
        capacity: values that are kept even if nobody else holds them.
    """

    __slots__ = ("_all", "_capacity", "_latest", "_lock")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._latest: OrderedDict[KeyT, ValueT] = OrderedDict()
        self._all: WeakValueDictionary[KeyT, ValueT] = WeakValueDictionary()  # in the order in which they were made

    def get(self, key: KeyT, make: Callable[[KeyT], ValueT]) -> ValueT:
        """Return the value of `key`, made if there is none; it becomes the most recently used one."""
        with self._lock:
            value = self._latest.get(key)
            if value is not None:
                self._latest.move_to_end(key)
                return value
            value = self._all.get(key)
            if value is None:
                value = self._all[key] = make(key)
            self._latest[key] = value
            if len(self._latest) > self._capacity:
                self._latest.popitem(last=False)
        return value

    def values(self) -> Sequence[ValueT]:
        """Return all values."""
        with self._lock:
            return tuple(self._all.values())

    def items(self) -> Sequence[tuple[KeyT, ValueT]]:
        """Return all keys and values."""
        with self._lock:
            return tuple(self._all.items())

"""A bounded cache that never has two values for one key at the same time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")

_LOOKED_AT = 16  # of the least recently used values, when one must go


class WeakLRU(Generic[KeyT, ValueT]):
    """A cache of the most recently used values by key; older ones are found as long as somebody holds them.

    So a limit, or a budget, that is dropped while a call holds it does not exist twice. Safe to use from any thread.

    Args:
        capacity: values that are kept even if nobody else holds them.
        can_drop: returns whether a value may be dropped; None for all. Beyond the capacity the others are kept too:
            ask `has_room` before a key is added.
    """

    __slots__ = ("_all", "_can_drop", "_capacity", "_latest", "_lock")

    def __init__(self, capacity: int, *, can_drop: Callable[[ValueT], bool] | None = None) -> None:
        self._capacity = capacity
        self._can_drop = can_drop
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
            if len(self._latest) >= self._capacity:
                self._drop_one()
            self._latest[key] = value
        return value

    def has_room(self) -> bool:
        """Return whether one more key fits; the least recently used value that may go is dropped for it."""
        with self._lock:
            return len(self._latest) < self._capacity or self._drop_one()

    def _drop_one(self) -> bool:
        """Drop a value that may go. Only a few are looked at; those that may not become the most recently used ones."""
        for _ in range(min(_LOOKED_AT, len(self._latest))):
            key, value = self._latest.popitem(last=False)
            if self._can_drop is None or self._can_drop(value):
                return True
            self._latest[key] = value
        return False

    def __contains__(self, key: KeyT) -> bool:
        with self._lock:
            return key in self._all

    def values(self) -> Sequence[ValueT]:
        """Return all values."""
        with self._lock:
            return tuple(self._all.values())

    def items(self) -> Sequence[tuple[KeyT, ValueT]]:
        """Return all keys and values."""
        with self._lock:
            return tuple(self._all.items())

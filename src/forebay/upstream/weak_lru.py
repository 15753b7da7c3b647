"""A bounded cache that never has two values for one key at the same time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Generic, TypeVar
from weakref import WeakValueDictionary

from forebay._fork import reset_in_child

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


_LOOKED_AT: Final = 64  # values that are considered when one must be dropped


class WeakLRU(Generic[KeyT, ValueT]):
    """A cache of the most recently used values by key; older ones are found as long as somebody holds them.

    So a limit, or a budget, that is dropped while a call holds it does not exist twice. Safe to use from any thread.

    Args:
        capacity: values that are kept even if nobody else holds them.
        expendable: returns whether a value may be dropped, for values that protect something; it must not use this
            cache. None: each may.
        overflow: returns the value that a further key shares with others while no value may be dropped. None: then the
            least recently used one is dropped all the same.
    """

    __slots__ = ("__weakref__", "_all", "_capacity", "_expendable", "_latest", "_lock", "_overflow")

    def __init__(
        self,
        capacity: int,
        *,
        expendable: Callable[[KeyT, ValueT], bool] | None = None,
        overflow: Callable[[KeyT], ValueT] | None = None,
    ) -> None:
        self._capacity = capacity
        self._expendable = expendable
        self._overflow = overflow
        self._lock = threading.Lock()
        reset_in_child(self)
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
            if len(self._latest) >= self._capacity and not self._drop_one():
                if value is None and self._overflow is not None:
                    return self._overflow(key)
                self._latest.popitem(last=False)
            if value is None:
                value = self._all[key] = make(key)
            self._latest[key] = value
        return value

    def reset_after_fork(self) -> None:
        """See `ForkAware`."""
        self._lock = threading.Lock()

    def holds(self, key: KeyT) -> bool:
        """Return whether there is a value of `key`, even one that is only held elsewhere."""
        return key in self._all

    def _drop_one(self) -> bool:
        """Drop the least recently used value that may be dropped; return False if none of those looked at may be."""
        latest, expendable = self._latest, self._expendable
        for _ in range(_LOOKED_AT if expendable is not None else 0):
            key, value = latest.popitem(last=False)
            if expendable is None or expendable(key, value):
                return True
            latest[key] = value  # at the end, so that the next search looks at others
        return False

    def values(self) -> Sequence[ValueT]:
        """Return all values."""
        with self._lock:
            return tuple(self._all.values())

    def items(self) -> Sequence[tuple[KeyT, ValueT]]:
        """Return all keys and values."""
        with self._lock:
            return tuple(self._all.items())

"""What is kept by key, up to a bound, and found for as long as anybody holds it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

KeyT = TypeVar("KeyT", bound=Hashable)
ValueT = TypeVar("ValueT")


class WeakLRU(Generic[KeyT, ValueT]):
    """The latest values by key, from any thread. Of those that are older, whatever is held elsewhere is found too.

    So no key ever has two values at the same time: a limit, or a sum of money, that was dropped while a call held it
    would be there twice.

    Args:
        most: how many are kept that nobody holds.
    """

    __slots__ = ("_all", "_latest", "_lock", "_most")

    def __init__(self, capacity: int) -> None:
        self._most = capacity
        self._lock = threading.Lock()
        self._latest: OrderedDict[KeyT, ValueT] = OrderedDict()
        self._all: WeakValueDictionary[KeyT, ValueT] = WeakValueDictionary()  # in the order in which they were made

    def get(self, key: KeyT, make: Callable[[KeyT], ValueT]) -> ValueT:
        """The value of `key`, made if there is none; it is now the latest."""
        with self._lock:
            value = self._latest.get(key)
            if value is not None:
                self._latest.move_to_end(key)
                return value
            value = self._all.get(key)
            if value is None:
                value = self._all[key] = make(key)
            self._latest[key] = value
            if len(self._latest) > self._most:
                self._latest.popitem(last=False)
        return value

    def values(self) -> Sequence[ValueT]:
        """All that there are."""
        with self._lock:
            return tuple(self._all.values())

    def items(self) -> Sequence[tuple[KeyT, ValueT]]:
        """Likewise, with their keys."""
        with self._lock:
            return tuple(self._all.items())

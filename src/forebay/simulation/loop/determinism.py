"""What makes one run like the next where asyncio leaves the order to chance.

asyncio keeps tasks in sets (``TaskGroup`` cancels from one), and so do its users. A set goes by hash and an object's
hash is by default its address, which differs from run to run. Here the hash is a number, in order of making. (Bare
coroutines cannot be numbered: give ``asyncio.as_completed``, which makes a set of what it gets, tasks.) And what a
finalizer does (closing an abandoned async generator, reporting a lost exception) must not depend on when the cyclic
garbage collector happens to come by.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator, Iterator

T = TypeVar("T")


class NumberedTask(asyncio.Task[T]):
    """A task that hashes to its number."""

    __slots__ = ("_number",)

    def __init__(self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], number: int, **options: Any) -> None:
        self._number = number  # first: asyncio puts the task into a set while making it
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


NumberedTask.__name__ = "Task"  # by which asyncio's messages call it


class NumberedFuture(asyncio.Future[T]):
    """A future that hashes to its number, which its loop sets: an `__init__` here would cost as much as the rest."""

    __slots__ = ("number",)
    number: int

    def __hash__(self) -> int:
        return self.number


class OrderedWeakSet(weakref.WeakKeyDictionary[T, None]):
    """A weak set that iterates in the order in which its members came."""

    def add(self, item: T) -> None:
        """Add `item`; one that is there keeps its place."""
        self[item] = None

    def discard(self, item: T) -> None:
        """Remove `item` if it is there."""
        self.pop(item, None)


NumberedFuture.__name__ = "Future"


@contextlib.contextmanager
def manual_gc() -> Iterator[None]:
    """Keep the cyclic garbage collector still: `collect` is called after so many steps, the same in each run."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_garbage(turn: int) -> None:
    """Collect what a run has left so far: mostly the young, every tenth turn the middle-aged, every hundredth all.

    Nothing grows old but by these calls, so the young are all that was made since the last one.
    """
    gc.collect(2 if turn % 100 == 0 else 1 if turn % 10 == 0 else 0)

"""Deterministic order where asyncio leaves it to memory addresses and to the garbage collector.

asyncio keeps tasks in sets (``TaskGroup`` cancels from one), and so does user code. Iteration over a set depends on
hashes, and by default an object's hash is its address, which differs from run to run. Here the hash of a task or future
is its sequence number. Bare coroutines cannot be numbered: pass tasks, not coroutines, to ``asyncio.as_completed``,
which puts its arguments into a set. Finalizers (closing an abandoned async generator, reporting an unhandled exception)
must not depend on when the cyclic garbage collector runs, so the loop runs it after a fixed number of steps.
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
    """A task whose hash is its sequence number."""

    __slots__ = ("_number",)

    def __init__(self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], number: int, **options: Any) -> None:
        self._number = number  # before the base class, which puts the task into a set
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


NumberedTask.__name__ = "Task"  # asyncio's messages print this name


class NumberedFuture(asyncio.Future[T]):
    """A future whose hash is its sequence number.

    The loop sets the number: an `__init__` here would double the cost of a future.
    """

    __slots__ = ("number",)
    number: int

    def __hash__(self) -> int:
        return self.number


NumberedFuture.__name__ = "Future"


class OrderedWeakSet(weakref.WeakKeyDictionary[T, None]):
    """A weak set that iterates in insertion order."""

    def add(self, item: T) -> None:
        """Add `item`; an item that is already present keeps its position."""
        self[item] = None

    def discard(self, item: T) -> None:
        """Remove `item` if it is present."""
        self.pop(item, None)


@contextlib.contextmanager
def manual_gc() -> Iterator[None]:
    """Disable the cyclic garbage collector in the block, so that only `collect_garbage` runs it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def collect_garbage(call: int) -> None:
    """Collect the young generation; on every tenth call also the middle one, on every hundredth all three.

    Objects are promoted by these calls only, so the young generation is all that was allocated since the last call.
    """
    gc.collect(2 if call % 100 == 0 else 1 if call % 10 == 0 else 0)

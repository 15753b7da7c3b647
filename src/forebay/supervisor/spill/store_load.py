"""The load of the overflow: how long it takes to answer, over how long it may take."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable
from typing import Final, TypeVar

from forebay.errors import StoreUnavailable

T = TypeVar("T")

RESOURCE: Final = "overflow"


class _Call:
    """A call of the store that has not been answered yet, or has."""

    __slots__ = ("answered", "began")

    def __init__(self, began: float) -> None:
        self.began = began
        self.answered = False

    def end(self) -> None:
        """Count it no more."""
        self.answered = True


class StoreLoad:
    """The load of a task store.

    Its *slowness* is the longest time that it has taken, halved each `allowed` seconds, over `allowed`; a call that it
    has not answered yet counts with its age.

    Args:
        loop: the event loop, whose time counts.
        allowed: seconds that an answer may take.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, allowed: float) -> None:
        self._loop = loop
        self._allowed = allowed
        self._pending: deque[_Call] = deque()  # the oldest first; those that were answered are dropped later
        self._peak = 0.0  # seconds
        self._peak_at = 0.0  # loop time
        self._failed = False

    async def measure(self, answer: Awaitable[T]) -> T:
        """Return the answer of the store, whose seconds count."""
        call = _Call(self._loop.time())
        self._pending.append(call)
        try:
            value = await answer
        except StoreUnavailable:
            self._failed = True
            raise
        else:
            self._failed = False
            return value
        finally:
            call.end()
            now = self._loop.time()
            if (taken := now - call.began) > self._decayed_peak(now):
                self._peak, self._peak_at = taken, now
            self._drop_answered()

    def slowness(self) -> float:
        """Return how slow the store is: at 1.0, leases lapse before they are renewed."""
        now = self._loop.time()
        self._drop_answered()
        waited = now - self._pending[0].began if self._pending else 0.0
        return max(waited, self._decayed_peak(now)) / self._allowed

    def load(self) -> float:
        """Return the slowness, or at least 1.0 if the last call failed."""
        return max(self.slowness(), 1.0 if self._failed else 0.0)

    def _decayed_peak(self, now: float) -> float:
        return self._peak * math.pow(0.5, (now - self._peak_at) / self._allowed)

    def _drop_answered(self) -> None:
        while self._pending and self._pending[0].answered:
            self._pending.popleft()

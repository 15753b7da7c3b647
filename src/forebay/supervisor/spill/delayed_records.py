"""Delayed records: stored tasks that wait in the store for a time, and are woken then."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import StoreUnavailable

if TYPE_CHECKING:
    from forebay.interfaces import TaskStore
    from forebay.supervisor.core import Core
    from forebay.supervisor.runs.timers import Timer

_RETRY_INTERVAL = 1.0  # seconds until a store that failed is asked again
_MAX_STALE = 64  # times of records that have gone, which are kept beside those of as many as there are
_LATENESS = 1e-3  # seconds after its time at which a record is woken: the clocks differ by fractions of that


class DelayedRecords:
    """The records in the store that wait for their next attempt, or for their `not_before`.

    Those that this process has delayed are woken by its own clock, however the wall clock is set meanwhile; those of a
    process that is gone, when they are due by the wall clock.

    Args:
        core: the objects that the parts of the supervisor share.
        store: the task store.
        on_woken: counts the records that wait, and refills.

    Attributes:
        count: how many there are, as far as is known.
    """

    def __init__(self, core: Core, store: TaskStore, *, on_woken: Callable[[], Awaitable[None]]) -> None:
        self._core = core
        self._store = store
        self._on_woken = on_woken
        self._own: list[tuple[float, float]] = []  # a heap of when those delayed here are due: loop time, epoch seconds
        self._timer: Timer | None = None
        self._timer_at = 0.0  # loop time
        self._waking = False
        self._recounts = 0  # asked for while one is under way
        self.count = 0

    def add(self, due: float, seconds: float) -> None:
        """Wake a record that is due at `due`, in epoch seconds, in `seconds` from now."""
        self.count += 1
        at = self._core.loop.time() + seconds
        heapq.heappush(self._own, (at, due))
        self._arm(at)

    async def wake(self) -> bool:
        """Wake the records that are due, and set the timer for the others; return whether any may wait now."""
        now, wall = self._core.loop.time(), clock.wall_time()
        own = 0
        while self._own and self._own[0][0] <= now:
            wall = max(wall, heapq.heappop(self._own)[1])
            own += 1
        try:
            result = await self._store.wake(now=wall)
        except BaseException:
            if own:
                heapq.heappush(self._own, (now + _RETRY_INTERVAL, wall))
                self._arm(now + _RETRY_INTERVAL)
            raise
        self.count = result.delayed
        if len(self._own) > 2 * result.delayed + _MAX_STALE:  # most have been cancelled; the rest go by the wall clock
            self._own.clear()
        if result.next_due is not None:
            left = max(0.0, result.next_due - clock.wall_time())
            self._arm(self._core.loop.time() + left + _LATENESS)
        if self._own:
            self._arm(self._own[0][0])
        return own > 0 or result.woken > 0  # another process may have woken them first

    def _arm(self, at: float) -> None:
        if self._timer is None or at < self._timer_at:
            self._core.timers.cancel(self._timer)
            self._timer_at = at
            self._timer = self._core.timers.at(at, self._on_due)

    def _on_due(self) -> None:
        self._timer = None
        if not self._waking:  # else those that are due now are woken once the store has answered
            self._waking = True
            self._core.run_in_background(self._wake(), if_cancelled=self._woken)

    async def _wake(self) -> None:
        try:
            woken = await self.wake()
        except StoreUnavailable:
            woken = False
        finally:
            self._woken()
        if woken:
            await self._on_woken()

    def recount(self) -> None:
        """Count the records again, and those that wait: a record of one of both kinds has ended."""
        self._recounts += 1
        if self._recounts == 1:  # otherwise the one under way counts once more
            self._core.run_in_background(self._recount(), if_cancelled=self._recount_again)

    def _recount_again(self) -> None:
        self._recounts = 0
        self.recount()

    async def _recount(self) -> None:
        asked = 0
        try:
            while asked != self._recounts:
                asked = self._recounts
                with contextlib.suppress(StoreUnavailable):  # they are counted when the next one is due
                    await self.wake()
                await self._on_woken()
        finally:
            self._recounts = 0

    def _woken(self) -> None:
        self._waking = False
        if self._own:
            self._arm(self._own[0][0])

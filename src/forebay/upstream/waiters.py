"""Waiting for an account's answer, on an event loop or in a plain thread; whoever heads the line watches the clock."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Protocol

from forebay import clock
from forebay.admission import QueueEntry
from forebay.upstream.call_request import Admitted, CallRequest, Rejected


class Waiter(Protocol):
    """Somebody who waits in an account's line. Both methods come from any thread, under the upstream's lock."""

    decision: Admitted | Rejected | None

    def resolve(self, decision: Admitted | Rejected) -> bool:
        """It may go, or will not. False: there is nobody any more to whom it could be told."""

    def wake_at(self, when: float) -> bool:
        """At that time of `clock.now`, see whether the line moves, for nobody else will. False: as above."""


class QueuedCall:
    """A call in the line, and who waits for its answer."""

    __slots__ = ("enqueued_at", "entry", "priority", "priority_since", "rank", "request", "waiter")

    def __init__(self, ask: CallRequest, waiter: Waiter, *, rank: tuple[float, float], now: float) -> None:
        self.request = ask
        self.waiter = waiter
        self.rank = rank
        self.priority = ask.priority
        self.enqueued_at = now
        self.priority_since = now  # on this rung
        self.entry: QueueEntry | None = None

    @property
    def is_queued(self) -> bool:
        """Whether it is in the line."""
        return self.entry is not None


class AsyncWaiter:
    """Waits on the running event loop.

    Args:
        look: called in that loop when it is time to see whether the line moves.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._alarm: asyncio.TimerHandle | None = None
        self._when = math.inf  # it looks then
        self._look = look
        self.decision: Admitted | Rejected | None = None

    async def wait(self) -> Admitted | Rejected:
        """The answer. Cancelled, it leaves `given` as it is then."""
        try:
            await self._future
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
        assert self.decision is not None  # noqa: S101 - woken by nothing else
        return self.decision

    def resolve(self, decision: Admitted | Rejected) -> bool:
        """See `Waiter`."""
        self.decision = decision
        return self._in_loop(self._wake)

    def wake_at(self, when: float) -> bool:
        """See `Waiter`."""
        if self._when <= when and not self._loop.is_closed():  # whoever looks then sees when to look again
            return True
        self._when = when
        return self._in_loop(lambda: self._arm(when))

    def _in_loop(self, callback: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # it is closed, and whoever waited on it is gone
            return False
        return True

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def _arm(self, when: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        if not self._future.done():
            self._alarm = self._loop.call_later(max(0.0, when - clock.now()), self._look_now)

    def _look_now(self) -> None:
        self._when = math.inf
        self._look()


class ThreadWaiter:
    """Waits in a plain thread."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._woken = threading.Event()
        self._when: float | None = None
        self._look = look
        self.decision: Admitted | Rejected | None = None

    def wait(self) -> Admitted | Rejected:
        """The answer."""
        while self.decision is None:
            when = self._when
            self._woken.wait(None if when is None else max(0.0, when - clock.now()))
            self._woken.clear()
            if self.decision is None and self._when is not None and clock.now() >= self._when:
                self._when = None
                self._look()
        return self.decision

    def resolve(self, decision: Admitted | Rejected) -> bool:
        """See `Waiter`."""
        self.decision = decision
        self._woken.set()
        return True

    def wake_at(self, when: float) -> bool:
        """See `Waiter`."""
        self._when = when
        self._woken.set()
        return True

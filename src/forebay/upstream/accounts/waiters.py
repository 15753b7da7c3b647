"""Callers that wait for an account's decision: on an event loop, or in a plain thread."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Protocol

from forebay import clock
from forebay.upstream.call_request import Admitted, Rejected


class Waiter(Protocol):
    """A caller that waits in an account's queue. Its methods are called from any thread, under the account's lock.

    Attributes:
        decision: the decision, once there is one.
    """

    decision: Admitted | Rejected | None

    @property
    def gone(self) -> bool:
        """True if nobody can take the decision any more."""

    def resolve(self, decision: Admitted | Rejected) -> bool:
        """Wake the caller with a decision. Return False if nobody waits any more."""

    def wake_at(self, when: float) -> bool:
        """Let the caller call `look` at `when` of `clock.now`. Return False if nobody waits any more."""


class AsyncWaiter:
    """A caller that waits on the running event loop.

    Args:
        look: serves the queue; called in that loop when the queue may move.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._when = math.inf  # when the timer fires
        self._look = look
        self.decision: Admitted | Rejected | None = None

    @property
    def gone(self) -> bool:
        """See `Waiter`. A closed loop does not wake its tasks, even those that were granted a permit."""
        return self._loop.is_closed()

    async def wait(self, seconds: float | None = None) -> Admitted | Rejected | None:
        """Wait, and return the decision; None if there is none within `seconds`, after which it may wait again."""
        end = None if seconds is None else self._loop.call_later(seconds, self._wake)
        over = True
        try:
            await self._future
            over = self.decision is not None
        finally:
            if end is not None:
                end.cancel()
            if over and self._timer is not None:
                self._timer.cancel()
        if not over:
            self._future = self._loop.create_future()
        return self.decision

    def resolve(self, decision: Admitted | Rejected) -> bool:
        """See `Waiter`."""
        self.decision = decision
        return self._call_in_loop(self._wake)

    def wake_at(self, when: float) -> bool:
        """See `Waiter`."""
        if self._when <= when and not self._loop.is_closed():  # the earlier look will set the next timer
            return True
        self._when = when
        return self._call_in_loop(lambda: self._set_timer(when))

    def _call_in_loop(self, callback: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed, and the caller is gone
            return False
        return True

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._future.done():
            self._timer = self._loop.call_later(max(0.0, when - clock.now()), self._look_now)

    def _look_now(self) -> None:
        self._when = math.inf
        self._look()


class ThreadWaiter:
    """A caller that waits in a plain thread.

    Args:
        look: serves the queue; called in that thread when the queue may move.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        self._woken = threading.Event()
        self._when: float | None = None  # when to look again
        self._look = look
        self.decision: Admitted | Rejected | None = None

    gone = False  # its thread waits until it is answered

    def wait(self, seconds: float | None = None) -> Admitted | Rejected | None:
        """Wait, and return the decision; None if there is none within `seconds`, after which it may wait again."""
        end = math.inf if seconds is None else clock.now() + seconds
        while self.decision is None:
            when = min(end, math.inf if self._when is None else self._when)
            self._woken.wait(None if when == math.inf else max(0.0, when - clock.now()))
            self._woken.clear()
            if self.decision is None and self._when is not None and clock.now() >= self._when:
                self._when = None
                self._look()
            elif self.decision is None and clock.now() >= end:
                return None
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

"""Time limits of the same length: one timer watches over all of them, where `asyncio.timeout` has one for each.

While the event loop was blocked, or its process stopped, answers may have come that it has not seen yet. So what is due
then gets some more time, once.
"""

from __future__ import annotations

import asyncio

_LATE = 0.1  # seconds by which a timer is late if the event loop did not run
_GRACE = 1.0  # seconds in which it takes up what has come meanwhile, at most


class TimeLimits:
    """Time limits of one length, for the tasks of one event loop.

    Args:
        seconds: the length.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[TimeLimit, None] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> TimeLimit:
        """Return a limit for what the current task does from now until its `stop`."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - it awaits
        loop = task.get_loop()
        limit = TimeLimit(task, loop.time() + self._seconds, self._running)
        self._running[limit] = None
        if self._timer is None:
            self._watch(limit, loop)
        return limit

    def _watch(self, limit: TimeLimit, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_at(limit.ends_at, self._check, loop, limit.ends_at)

    def _check(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        """Cancel the tasks whose time is over, and wait for the end of the next one."""
        self._timer = None
        is_late = loop.time() - due > _LATE
        for limit in list(self._running):
            if is_late and limit.ends_at <= loop.time():
                limit.extend(loop.time() + min(_GRACE, self._seconds))
            if limit.ends_at > loop.time():
                self._watch(limit, loop)
                return
            limit.cancel()


class TimeLimit:
    """One time limit: its task is cancelled when it ends."""

    __slots__ = ("_cancelling", "_is_extended", "_is_over", "_running", "_task", "ends_at")

    def __init__(self, task: asyncio.Task[object], ends_at: float, running: dict[TimeLimit, None]) -> None:
        self._task = task
        self._running = running
        self._cancelling = task.cancelling()
        self._is_over = False
        self._is_extended = False
        self.ends_at = ends_at  # loop time

    def stop(self) -> None:
        """End the limit: what it was for has ended."""
        self._running.pop(self, None)

    def extend(self, ends_at: float) -> None:
        """Let it end later, unless that was done before."""
        if not self._is_extended:
            self._is_extended, self.ends_at = True, ends_at

    def cancel(self) -> None:
        """Cancel its task, because its time is over."""
        self.stop()
        self._is_over = True
        self._task.cancel()

    def has_cancelled(self) -> bool:
        """Return whether a cancellation of the task is that of this limit, and of nobody else; take it back then."""
        return self._is_over and self._task.uncancel() <= self._cancelling

"""Time limits of the same length: one timer watches over all of them, where `asyncio.timeout` has one for each."""

from __future__ import annotations

import asyncio


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
            self._timer = loop.call_at(limit.ends_at, self._check, loop)
        return limit

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the tasks whose time is over, and wait for the end of the next one."""
        self._timer = None
        for limit in list(self._running):
            if limit.ends_at > loop.time():
                self._timer = loop.call_at(limit.ends_at, self._check, loop)
                return
            limit.cancel()


class TimeLimit:
    """One time limit: its task is cancelled when it ends."""

    __slots__ = ("_cancelling", "_is_over", "_running", "_task", "ends_at")

    def __init__(self, task: asyncio.Task[object], ends_at: float, running: dict[TimeLimit, None]) -> None:
        self._task = task
        self._running = running
        self._cancelling = task.cancelling()
        self._is_over = False
        self.ends_at = ends_at  # loop time

    def stop(self) -> None:
        """End the limit: what it was for has ended."""
        self._running.pop(self, None)

    def cancel(self) -> None:
        """Cancel its task, because its time is over."""
        self.stop()
        self._is_over = True
        self._task.cancel()

    def has_cancelled(self) -> bool:
        """Return whether a cancellation of the task is that of this limit, and of nobody else; take it back then."""
        return self._is_over and self._task.uncancel() <= self._cancelling

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

    Attributes:
        seconds: the length.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running: dict[TimeLimit, None] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> TimeLimit:
        """Return a limit for what the current task of a loop does from now until its `stop`."""
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - it awaits
        limit = TimeLimit(task, loop.time())
        self._running[limit] = None
        if self._timer is None:
            self._watch(limit, loop)
        return limit

    def stop(self, limit: TimeLimit, loop: asyncio.AbstractEventLoop) -> float:
        """End a limit, because what it was for has ended, and return the seconds that this took."""
        self._running.pop(limit, None)
        return loop.time() - limit.started_at

    def oldest_start(self) -> float | None:
        """Return the loop time at which the oldest of the limits was started; None if there is none."""
        return next((limit.started_at for limit in self._running), None)

    def _ends_at(self, limit: TimeLimit) -> float:
        return limit.extended_to or limit.started_at + self.seconds

    def _watch(self, limit: TimeLimit, loop: asyncio.AbstractEventLoop) -> None:
        due = self._ends_at(limit)
        self._timer = loop.call_at(due, self._check, loop, due)

    def _check(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        """Cancel the tasks whose time is over, and wait for the end of the next one."""
        self._timer = None
        is_late = loop.time() - due > _LATE
        for limit in list(self._running):
            if is_late and self._ends_at(limit) <= loop.time():
                limit.extend(loop.time() + min(_GRACE, self.seconds))
            if self._ends_at(limit) > loop.time():
                self._watch(limit, loop)
                return
            del self._running[limit]
            limit.cancel()


class TimeLimit:
    """One time limit: its task is cancelled when it ends.

    Attributes:
        started_at: loop time.
        extended_to: loop time at which it ends instead of when it is due; 0: it was not extended.
    """

    _is_over = False
    extended_to = 0.0

    def __init__(self, task: asyncio.Task[object], started_at: float) -> None:
        self._task = task
        self._cancelling = task.cancelling()
        self.started_at = started_at

    def extend(self, ends_at: float) -> None:
        """Let it end later, unless that was done before."""
        if not self.extended_to:
            self.extended_to = ends_at

    def cancel(self) -> None:
        """Cancel its task, because its time is over."""
        self._is_over = True
        self._task.cancel()

    def has_cancelled(self) -> bool:
        """Return whether a cancellation of the task is that of this limit, and of nobody else; take it back then."""
        return self._is_over and self._task.uncancel() <= self._cancelling

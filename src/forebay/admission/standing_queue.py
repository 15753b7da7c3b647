"""Standing queues: tells a queue that overload keeps long from one that a burst has filled."""

from __future__ import annotations

import math
from typing import Final

_INTERVAL: Final = 0.5  # of the time that a task has; a burst that takes longer to serve makes tasks late


class StandingQueue:
    """The waits of the tasks with deadlines of one priority, and whether their queue stands.

    A queue stands once no task has waited for less than its bound over an interval, and until over an interval none has
    waited for longer or been rejected for its wait. An interval is half of the time that such tasks have in all. A
    burst fills a queue that does not stand: it is served in time, and a bound that keeps a standing queue short would
    leave slots idle after it.

    Source: RFC 8289, "Controlled Delay Active Queue Management", for the least wait of an interval.
    """

    __slots__ = ("_above_since", "_observed_at", "_stands_until")

    def __init__(self) -> None:
        self._above_since: float | None = None
        self._observed_at = -math.inf
        self._stands_until = -math.inf

    def stands(self, now: float) -> bool:
        """Return whether the queue stands."""
        return now < self._stands_until

    def observe(self, now: float, wait: float, *, bound: float, time: float) -> None:
        """Record that the turn of a task came.

        Args:
            now: loop time, in seconds.
            wait: seconds for which the task has waited.
            bound: seconds that it should have waited at most.
            time: seconds from its submission to its deadline.
        """
        interval = _INTERVAL * time
        if wait <= bound:
            self._above_since = None
        elif self._above_since is None or now - self._observed_at > interval:  # the queue was empty meanwhile
            self._above_since = now
        elif now - self._above_since >= interval:
            self._keep(now, time)
        self._observed_at = now

    def rejected(self, now: float, time: float) -> None:
        """Record that a task with `time` seconds to its deadline was rejected for its expected wait."""
        self._keep(now, time)

    def _keep(self, now: float, time: float) -> None:
        self._stands_until = max(self._stands_until, now + _INTERVAL * time)

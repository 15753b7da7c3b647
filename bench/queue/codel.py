"""CoDel for a queue of tasks with deadlines: tells a queue that stands from one that a burst filled.

Source: RFC 8289, "Controlled Delay Active Queue Management": the queue stands once the least wait of an interval was
above the target; then the head is dropped, again after interval / sqrt(drops), until a wait is below the target.
"""

from __future__ import annotations

import math
from typing import Final

TARGET: Final = 0.5  # of a task's time to its deadline
MIN_INTERVAL: Final = 1.0  # seconds
GAPS: Final = 4  # dequeue gaps in an interval, at least: fewer waits say nothing about their minimum
_GAIN: Final = 0.1  # weight of the newest gap


class CoDel:
    """The state of the queue of one priority. Pure: it is told the time and the wait of each task that is dequeued.

    Args:
        target: the wait, as a share of the time from submission to deadline, up to which a queue does not stand.

    Attributes:
        stands: True once the least wait over an interval has been above the target, until one is below it.
    """

    def __init__(self, target: float = TARGET) -> None:
        self._target = target
        self._gap: float | None = None  # seconds between dequeues, as a moving mean
        self._last: float | None = None  # time of the last dequeue
        self._above_since: float | None = None
        self._next_drop = 0.0
        self._drops = 0
        self.stands = False

    @property
    def interval(self) -> float:
        """The seconds over which the least wait counts."""
        return max(MIN_INTERVAL, GAPS * (self._gap or 0.0))

    def observe(self, now: float, share: float) -> None:
        """Record that a task is dequeued after `share` of its time."""
        if self._last is not None:
            gap = now - self._last
            self._gap = gap if self._gap is None else self._gap + _GAIN * (gap - self._gap)
        self._last = now
        if share < self._target:
            self._above_since, self.stands = None, False
        elif self._above_since is None:
            self._above_since = now
        elif not self.stands and now - self._above_since >= self.interval:
            # As in the RFC: a queue that stands again soon after needs about as many drops as before.
            self._drops = self._drops - 2 if self._drops > 2 and now - self._next_drop < 16 * self.interval else 1
            self._next_drop, self.stands = now, True

    def drops_head(self, now: float) -> bool:
        """Return whether the task that is dequeued now is dropped."""
        if not self.stands or now < self._next_drop:
            return False
        self._next_drop = max(now, self._next_drop) + self.interval / math.sqrt(self._drops)
        self._drops += 1
        return True

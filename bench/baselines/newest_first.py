"""The best that a scheduler can do which does not know how long tasks take: every free slot gets the newest task.

A task that starts at once has all of its time left, so it is the least likely to be cut off at its deadline. Its price:
whoever is not served at once learns it at the deadline.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


def share_of_slots(  # noqa: PLR0913 - each has a name
    service: Callable[[], float], gap: Callable[[], float], *, slots: int, timeout: float, start: float, end: float
) -> float:
    """Return the share of the slots that did useful work from `start` to `end`, in seconds.

    Args:
        service: draws the seconds that a task takes.
        gap: draws the seconds until the next task arrives.
        slots: how many tasks run at a time.
        timeout: seconds from the arrival of a task to its deadline.
        start: from when work counts.
        end: until when tasks arrive, and work counts.
    """
    running: list[float] = []  # when slots become free
    waiting: list[tuple[float, float]] = []  # arrivals, and seconds of work, the newest last
    work, arrival = 0.0, 0.0
    while arrival < end:
        waiting.append((arrival, service()))
        arrival += gap()
        while waiting:
            arrived, seconds = waiting[-1]
            now = max(arrived, running[0] if len(running) == slots else arrived)
            if now >= arrival:  # a newer one comes first
                break
            if len(running) == slots:
                heapq.heappop(running)
            waiting.pop()
            deadline = arrived + timeout
            if now >= deadline:
                waiting.clear()  # all others are older
                heapq.heappush(running, now)
                break
            finish = min(now + seconds, deadline)
            heapq.heappush(running, finish)
            if finish == now + seconds and start <= finish < end:
                work += seconds
    return work / (end - start) / slots

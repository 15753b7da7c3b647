"""The refill policy: which stored tasks come back into the queue next, and how many. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.task import Priority

_MAX_SKIPPED = 20  # records of better priorities after which one of a priority that was skipped comes back


class RefillPolicy:
    """A policy that decides which stored tasks of one task type come back into the queue.

    The best stored priority comes first. Queued tasks count only as far as they would be served before it: a better
    task in the store does not wait until a queue of worse ones is empty. And even under a flood of better work, stored
    or not, every priority makes progress. It is asked each time that a task has started or ended.

    Args:
        max_skipped: records of better priorities that may come back before one record of a worse priority does, and
            times that it may be asked in a row while queued tasks go before every record.
    """

    def __init__(self, *, max_skipped: int = _MAX_SKIPPED) -> None:
        self._max_skipped = max_skipped
        self._skipped = dict.fromkeys(Priority, 0)  # records of better priorities fetched while this one waited
        self._passed_over = 0  # times that queued tasks went before every record since the latest fetch

    def next_batch(
        self, *, slots: int, capacity: int, queued: Sequence[int], stored: Mapping[Priority, int]
    ) -> tuple[Priority, int] | None:
        """Return the priority to fetch and how many records of it; None if none should come back now.

        Args:
            slots: how many tasks could start soon: free slots, and those that become free during the fetch.
            capacity: how many more tasks the queue can take.
            queued: how many tasks are queued, by priority.
            stored: how many tasks wait in the store, by priority.
        """
        best = next((priority for priority in Priority if stored[priority]), None)
        if best is None or capacity <= 0:
            return None
        if any(queued):
            slots = max(slots, 1)  # the head of the queue must not be worse than the best task in the store
        count = min(slots - sum(queued[: best + 1]), stored[best], capacity)
        if count <= 0:
            self._passed_over += 1
            if self._passed_over <= self._max_skipped:
                return None
            count = 1  # tasks that never wait in the store must not keep those in it from coming back
        for priority in reversed(Priority):
            if priority > best and stored[priority] and self._skipped[priority] >= self._max_skipped:
                return priority, 1
        return best, count

    def record_fetch(self, priority: Priority, count: int, stored: Mapping[Priority, int]) -> None:
        """Record that `count` records of `priority` were fetched while `stored` waited."""
        self._passed_over = 0
        self._skipped[priority] = 0
        for worse in Priority:
            if worse > priority:
                self._skipped[worse] = self._skipped[worse] + count if stored[worse] else 0

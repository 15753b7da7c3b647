"""Which of the tasks that wait outside are to come back next, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.task import Priority

_MAX_SKIPPED = 20  # rows of better rungs after which one of a rung that was passed over comes back


class RefillPolicy:
    """Decides for one task type. Pure: it is told, and answers.

    The best rung outside comes first. What waits inside counts only as far as it would be served before: a better task
    outside does not wait until a line of worse ones is empty. And under a flood of better work every rung still moves.
    """

    def __init__(self, *, max_skipped: int = _MAX_SKIPPED) -> None:
        self._max_skipped = max_skipped
        self._skipped = dict.fromkeys(Priority, 0)  # rows of better rungs that came back while this one waited

    def next_batch(
        self, *, slots: int, capacity: int, queued: Sequence[int], stored: Mapping[Priority, int]
    ) -> tuple[Priority, int] | None:
        """The rung to fetch from and how many; None if nothing should come in now.

        Args:
            seats: how many could start soon: free slots, and what drains while rows are fetched.
            room: how many the line can take.
            inside: how many wait inside, by rung.
            outside: how many wait outside, by rung.
        """
        best = next((rung for rung in Priority if stored[rung]), None)
        if best is None or capacity <= 0:
            return None
        if any(queued):
            slots = max(slots, 1)  # who waits at the head must not be worse than who waits outside
        count = min(slots - sum(queued[: best + 1]), stored[best], capacity)
        if count <= 0:
            return None
        for rung in reversed(Priority):
            if rung > best and stored[rung] and self._skipped[rung] >= self._max_skipped:
                return rung, 1
        return best, count

    def record_fetch(self, priority: Priority, count: int, stored: Mapping[Priority, int]) -> None:
        """Take note that `count` rows of `rung` came in while `outside` waited."""
        self._skipped[priority] = 0
        for worse in Priority:
            if worse > priority:
                self._skipped[worse] = self._skipped[worse] + count if stored[worse] else 0

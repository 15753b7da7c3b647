"""Which of the tasks that wait outside are to come back next, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forebay.task import Priority

_FLOOR = 20  # rows of better rungs after which one of a rung that was passed over comes back


class Pacing:
    """Decides for one task type. Pure: it is told, and answers.

    The best rung outside comes first. What waits inside counts only as far as it would be served before: a better task
    outside does not wait until a line of worse ones is empty. And under a flood of better work every rung still moves.
    """

    def __init__(self, *, floor: int = _FLOOR) -> None:
        self._floor = floor
        self._passed = dict.fromkeys(Priority, 0)  # rows of better rungs that came back while this one waited

    def wish(
        self, *, seats: int, room: int, inside: Sequence[int], outside: Mapping[Priority, int]
    ) -> tuple[Priority, int] | None:
        """The rung to fetch from and how many; None if nothing should come in now.

        Args:
            seats: how many could start soon: free slots, and what drains while rows are fetched.
            room: how many the line can take.
            inside: how many wait inside, by rung.
            outside: how many wait outside, by rung.
        """
        best = next((rung for rung in Priority if outside[rung]), None)
        if best is None or room <= 0:
            return None
        if any(inside):
            seats = max(seats, 1)  # who waits at the head must not be worse than who waits outside
        count = min(seats - sum(inside[: best + 1]), outside[best], room)
        if count <= 0:
            return None
        for rung in reversed(Priority):
            if rung > best and outside[rung] and self._passed[rung] >= self._floor:
                return rung, 1
        return best, count

    def fetched(self, rung: Priority, count: int, outside: Mapping[Priority, int]) -> None:
        """Take note that `count` rows of `rung` came in while `outside` waited."""
        self._passed[rung] = 0
        for worse in Priority:
            if worse > rung:
                self._passed[worse] = self._passed[worse] + count if outside[worse] else 0

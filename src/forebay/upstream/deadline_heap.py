"""Whose deadline passes first, among those who stand in a line."""

from __future__ import annotations

import heapq
import math
from typing import Generic, Protocol, TypeVar

_LEAST_GONE = 64  # below that many, those who have left are not worth a sweep


class DeadlineEntry(Protocol):
    """Somebody who waits in a line."""

    @property
    def is_queued(self) -> bool:
        """Whether it still does."""


S = TypeVar("S", bound=DeadlineEntry)


class DeadlineHeap(Generic[S]):
    """Finds those whose deadline has passed, wherever in the line they stand. Who has left is forgotten by itself."""

    __slots__ = ("_heap", "_turn")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, S]] = []
        self._turn = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline: float, who: S, *, length: int) -> None:
        """`who` waits until `deadline`; infinity is no deadline. `length`: how many stand in the line."""
        if deadline == math.inf:
            return
        if len(self._heap) > 2 * length + _LEAST_GONE:
            self._heap = [entry for entry in self._heap if entry[2].is_queued]
            heapq.heapify(self._heap)
        self._turn += 1
        heapq.heappush(self._heap, (deadline, self._turn, who))

    def next_deadline(self) -> float | None:
        """When the next one passes; None for never."""
        while self._heap and not self._heap[0][2].is_queued:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_overdue(self, now: float) -> S | None:
        """One whose deadline has passed by `now`; it is not told of twice."""
        when = self.next_deadline()
        return heapq.heappop(self._heap)[2] if when is not None and when <= now else None

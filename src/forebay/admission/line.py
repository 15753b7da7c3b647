"""The line: a waiting room ordered by priority, then rank and turn, in which nobody starves."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from forebay.task import Priority

T = TypeVar("T")

# [rank, turn, item or None, rung]: a list, so that leaving is one assignment and the heap finds out later
Place = list[Any]
_ITEM, _RUNG = 2, 3
_LEAST_DEAD = 64  # below that many, the dead are not worth a sweep


class Line(Generic[T]):
    """Items by rung, then by `rank` (lowest first; a deadline for instance), then by `turn`: the order they came.

    Each rung is served at least once in `floor` dequeues for every better rung's pleasure: under a flood of CRITICAL
    work LOW still moves. The line counts; whoever fills it keeps its bound.
    """

    __slots__ = ("_dead", "_floor", "_heaps", "_lengths", "_passed")

    def __init__(self, *, floor: int = 20) -> None:
        self._floor = floor
        self._heaps: tuple[list[Place], ...] = tuple([] for _ in Priority)
        self._lengths = [0] * len(Priority)
        self._passed = [0] * len(Priority)  # dequeues that went to a better rung while this one waited
        self._dead = 0

    def __len__(self) -> int:
        return sum(self._lengths)

    def __bool__(self) -> bool:
        return any(self._lengths)

    def __iter__(self) -> Iterator[T]:
        """Every item, in no particular order."""
        for heap in self._heaps:
            for place in heap:
                if place[_ITEM] is not None:
                    yield place[_ITEM]

    def ahead(self, rung: Priority) -> int:
        """How many would be served before a newcomer of `rung`."""
        return sum(self._lengths[: rung + 1])

    def join(self, item: T, rung: Priority, rank: Any, turn: int) -> Place:
        """Take a place. Ranks must compare with one another; turns must be unique."""
        place: Place = [rank, turn, item, rung]
        heapq.heappush(self._heaps[rung], place)
        self._lengths[rung] += 1
        return place

    def leave(self, place: Place) -> None:
        """Give a place up before its turn. Leaving twice, or after being served, does nothing."""
        if place[_ITEM] is None:
            return
        place[_ITEM] = None
        self._lengths[place[_RUNG]] -= 1
        self._dead += 1
        if self._dead > _LEAST_DEAD and self._dead > len(self):
            self._sweep()

    def head(self) -> Place | None:
        """The place that `pop` would serve, or None."""
        rung = self._next_rung()
        if rung is None:
            return None
        heap = self._heaps[rung]
        while heap[0][_ITEM] is None:
            heapq.heappop(heap)
            self._dead -= 1
        return heap[0]

    def pop(self) -> T:
        """Serve the head.

        Raises:
            IndexError: nobody waits.
        """
        place = self.head()
        if place is None:
            raise IndexError
        rung = place[_RUNG]
        heapq.heappop(self._heaps[rung])
        self._lengths[rung] -= 1
        item: T = place[_ITEM]
        place[_ITEM] = None
        self._passed[rung] = 0
        for lower in range(rung + 1, len(Priority)):
            if self._lengths[lower]:
                self._passed[lower] += 1
        return item

    def _next_rung(self) -> int | None:
        best = None
        for rung, length in enumerate(self._lengths):
            if not length:
                self._passed[rung] = 0
            elif self._passed[rung] >= self._floor:
                return rung
            elif best is None:
                best = rung
        return best

    def _sweep(self) -> None:
        for heap in self._heaps:
            heap[:] = [place for place in heap if place[_ITEM] is not None]
            heapq.heapify(heap)
        self._dead = 0

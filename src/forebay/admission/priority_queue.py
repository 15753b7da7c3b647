"""The line: a waiting room ordered by priority, then rank and turn, in which nobody starves."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

from forebay.task import Priority

T = TypeVar("T")

# [rank, turn, item or None, rung]: a list, so that leaving is one assignment and the heap finds out later
QueueEntry = list[Any]
_TURN, _ITEM, _RUNG = 1, 2, 3
_LEAST_DEAD = 64  # below that many, the dead are not worth a sweep

RANK_LAST = (True, math.inf)  # the rank of those who go by their turn alone, behind all others


class PriorityQueue(Generic[T]):
    """Items by rung, then by `rank` (lowest first; a deadline for instance), then by `turn`: the order they came.

    `length` is how many wait, as `len` says, without a call.

    Each rung is served at least once in `floor` dequeues for every better rung's pleasure: under a flood of CRITICAL
    work LOW still moves. The line counts; whoever fills it keeps its bound.
    """

    __slots__ = ("_dead", "_floor", "_heaps", "_lengths", "_passed", "_queues", "_rung", "length")

    def __init__(self, *, starvation_bound: int = 20) -> None:
        self._floor = starvation_bound
        self._heaps: tuple[list[QueueEntry], ...] = tuple([] for _ in Priority)
        self._queues: tuple[deque[QueueEntry], ...] = tuple(deque() for _ in Priority)  # those of rank LAST, if in turn
        self.length = 0  # items in all
        self._lengths = [0] * len(Priority)
        self._passed = [0] * len(Priority)  # dequeues that went to a better rung while this one waited
        self._rung = 0  # which was served last
        self._dead = 0

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return self.length > 0

    def __iter__(self) -> Iterator[T]:
        """Every item, in no particular order."""
        for place in chain(*self._heaps, *self._queues):
            if place[_ITEM] is not None:
                yield place[_ITEM]

    @property
    def lengths(self) -> Sequence[int]:
        """How many wait, by rung."""
        return self._lengths

    def ahead(self, priority: Priority) -> int:
        """How many would be served before a newcomer of `rung`."""
        return sum(self._lengths[: priority + 1])

    def push(self, item: T, priority: Priority, rank: Any, sequence: int) -> QueueEntry:
        """Take a place. Ranks must compare with one another and with LAST; turns must be unique."""
        place: QueueEntry = [rank, sequence, item, priority]
        queue = self._queues[priority]
        if rank == RANK_LAST and (not queue or queue[-1][_TURN] < sequence):
            queue.append(place)  # nearly all of them, and a queue is much cheaper than a heap
        else:
            heapq.heappush(self._heaps[priority], place)
        self._lengths[priority] += 1
        self.length += 1
        return place

    def remove(self, entry: QueueEntry) -> None:
        """Give a place up before its turn. Leaving twice, or after being served, does nothing."""
        if entry[_ITEM] is None:
            return
        entry[_ITEM] = None
        self._shorten(entry[_RUNG])
        self._dead += 1
        if self._dead > _LEAST_DEAD and self._dead > self.length:
            self._sweep()

    def head(self) -> QueueEntry | None:
        """The place that `pop` would serve, or None."""
        return self._head(self._next_rung()) if self.length else None

    def first_of(self, priority: Priority) -> QueueEntry | None:
        """The first place of one rung, or None."""
        return self._head(priority) if self._lengths[priority] else None

    def in_order(self) -> Iterator[T]:
        """Every item, the head first, the others by rung, rank and turn; each is found when it is asked for.

        The line must not change meanwhile.
        """
        head = self.head()
        if head is not None:
            yield head[_ITEM]
        for rung in Priority:
            if self._lengths[rung]:
                places, queue = _in_order(self._heaps[rung]), self._queues[rung]
                for place in heapq.merge(places, queue) if queue else places:
                    if place[_ITEM] is not None and place is not head:
                        yield place[_ITEM]

    def pop(self) -> T:
        """Serve the head.

        Raises:
            IndexError: nobody waits.
        """
        place = self.head()
        if place is None:
            raise IndexError
        item: T = place[_ITEM]
        self.serve(place)
        return item

    def serve(self, head: QueueEntry, joined_priority: Priority | None = None) -> None:
        """Take the head off the line. It counts as served, which one that leaves does not.

        Args:
            head: the place.
            came_on: the rung on which it came, if it has been put on a better one since: those there, or on rungs
                between, are not passed over by it. Else its fellows would starve of one another, and the floor serve
                the last of them first.
        """
        rung: int = head[_RUNG]
        self._rung = rung
        heap = self._heaps[rung]
        if heap and heap[0] is head:
            heapq.heappop(heap)
        else:
            self._queues[rung].popleft()
        head[_ITEM] = None
        self._shorten(rung)
        self._passed[rung] = 0
        if self.length > self._lengths[rung]:
            for lower in range((rung if joined_priority is None else joined_priority) + 1, len(Priority)):
                if self._lengths[lower]:
                    self._passed[lower] += 1

    def _shorten(self, rung: int) -> None:
        self.length -= 1
        self._lengths[rung] -= 1
        if not self._lengths[rung]:
            self._passed[rung] = 0  # who joins later has not waited

    def _next_rung(self) -> int:
        lengths = self._lengths
        if lengths[self._rung] == self.length:
            return self._rung  # nobody waits elsewhere
        starving = (rung for rung, passed in enumerate(self._passed) if passed >= self._floor)
        return next(starving, next(rung for rung, length in enumerate(lengths) if length))

    def _head(self, rung: int) -> QueueEntry:
        """The first who waits on a rung, where somebody does. The dead before it are let go."""
        heap, queue = self._heaps[rung], self._queues[rung]
        while heap and heap[0][_ITEM] is None:
            heapq.heappop(heap)
            self._dead -= 1
        while queue and queue[0][_ITEM] is None:
            queue.popleft()
            self._dead -= 1
        if heap and queue:
            return min(heap[0], queue[0])
        return heap[0] if heap else queue[0]

    def _sweep(self) -> None:
        for heap in self._heaps:
            heap[:] = [place for place in heap if place[_ITEM] is not None]
            heapq.heapify(heap)
        for queue in self._queues:
            live = [place for place in queue if place[_ITEM] is not None]
            queue.clear()
            queue.extend(live)
        self._dead = 0


def _in_order(heap: list[QueueEntry]) -> Iterator[QueueEntry]:
    """The places of a heap, lowest first, without taking it apart."""
    length = len(heap)
    coming = [(heap[0], 0)] if heap else []
    while coming:
        place, at = coming[0]
        yield place
        child = 2 * at + 1
        if child < length:
            heapq.heapreplace(coming, (heap[child], child))
            if child + 1 < length:
                heapq.heappush(coming, (heap[child + 1], child + 1))
        else:
            heapq.heappop(coming)

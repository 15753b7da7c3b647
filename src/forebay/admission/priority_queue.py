"""A priority queue that starves no priority."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

from forebay.task import Priority

T = TypeVar("T")
E = TypeVar("E")

# [rank, sequence, item or None, priority]: a list, so that a removal is one assignment, which the heap finds later
QueueEntry = list[Any]
_SEQUENCE, _ITEM, _PRIORITY = 1, 2, 3
_MIN_SWEEP = 64  # removed entries below which a sweep does not pay

RANK_LAST = (2, math.inf)  # the rank of items that go by their sequence number alone, behind all others


class PriorityQueue(Generic[T]):
    """A queue ordered by priority, then `rank` (lowest first; a deadline for instance), then `sequence` number.

    A flood of better work cannot starve a priority: one that has been passed over `starvation_bound` times is served
    next. The queue is unbounded: its owner keeps the bound.

    Args:
        starvation_bound: dequeues of better priorities after which a waiting priority is served.

    Attributes:
        length: the number of items, as `len` returns, without the cost of a call.
    """

    __slots__ = (
        "_fifos",
        "_heaps",
        "_last_served",
        "_lengths",
        "_passed_over",
        "_removed",
        "_starvation_bound",
        "length",
    )

    def __init__(self, *, starvation_bound: int = 20) -> None:
        self._starvation_bound = starvation_bound
        self._heaps: tuple[list[QueueEntry], ...] = tuple([] for _ in Priority)
        self._fifos: tuple[deque[QueueEntry], ...] = tuple(deque() for _ in Priority)  # rank RANK_LAST, in sequence
        self.length = 0
        self._lengths = [0] * len(Priority)
        self._passed_over = [0] * len(Priority)  # dequeues of better priorities while this one waited
        self._last_served = 0  # priority
        self._removed = 0  # entries that are still in a heap or a FIFO

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return self.length > 0

    def __iter__(self) -> Iterator[T]:
        """Iterate over all items in no particular order."""
        return (entry[_ITEM] for entry in self.entries())

    def entries(self) -> Iterator[QueueEntry]:
        """Iterate over the entries of all items, those of equal rank by sequence number."""
        return (entry for entry in chain(*self._heaps, *self._fifos) if entry[_ITEM] is not None)

    @property
    def passed_over(self) -> Sequence[int]:
        """The number of times that each priority was passed over while it waited."""
        return self._passed_over

    @property
    def lengths(self) -> Sequence[int]:
        """The number of items by priority."""
        return self._lengths

    def ahead(self, priority: Priority) -> int:
        """Return how many items would be served before a new one of `priority`."""
        return sum(self._lengths[: priority + 1])

    def push(self, item: T, priority: Priority, rank: Any, sequence: int) -> QueueEntry:
        """Add an item; return its entry, for `remove`.

        Ranks must be comparable with each other and with RANK_LAST, and sequence numbers unique.
        """
        entry: QueueEntry = [rank, sequence, item, priority]
        index = priority._value_  # a plain number: an enum is slow as an index, and this is a hot path
        fifo = self._fifos[index]
        if (rank is RANK_LAST or rank == RANK_LAST) and (not fifo or fifo[-1][_SEQUENCE] < sequence):
            fifo.append(entry)  # nearly all items, and a deque is much cheaper than a heap
        else:
            heapq.heappush(self._heaps[index], entry)
        self._lengths[index] += 1
        self.length += 1
        return entry

    def remove(self, entry: QueueEntry) -> None:
        """Remove an item before it is served. Do nothing if it was removed or served already."""
        if entry[_ITEM] is None:
            return
        entry[_ITEM] = None
        self._shorten(entry[_PRIORITY])
        self._removed += 1
        if self._removed > _MIN_SWEEP and self._removed > self.length:
            self._sweep()

    def head(self) -> QueueEntry | None:
        """Return the entry that `pop` would serve, or None."""
        return self._first(self._next_priority()) if self.length else None

    def serving_order(self) -> Sequence[Priority]:
        """Return the priorities in the order in which they are served now: those passed over too often go first."""
        return sorted(Priority, key=lambda priority: self._passed_over[priority] < self._starvation_bound)

    def is_overdue(self, priority: Priority) -> bool:
        """Return whether a priority was passed over so often that it is served next."""
        return self._passed_over[priority] >= self._starvation_bound

    def first_of(self, priority: Priority) -> QueueEntry | None:
        """Return the first entry of one priority, or None."""
        return self._first(priority) if self._lengths[priority] else None

    def in_order(self) -> Iterator[T]:
        """Iterate over all items: the head, then the others by priority, rank and sequence number.

        Each item is found when it is asked for. The queue must not change meanwhile.
        """
        head = self.head()
        if head is not None:
            yield head[_ITEM]
        for priority in Priority:
            if self._lengths[priority]:
                entries, fifo = heap_in_order(self._heaps[priority]), self._fifos[priority]
                for entry in heapq.merge(entries, fifo) if fifo else entries:
                    if entry[_ITEM] is not None and entry is not head:
                        yield entry[_ITEM]

    def pop(self) -> T:
        """Serve the head and return its item.

        Raises:
            IndexError: the queue is empty.
        """
        priority, length = self._last_served, self.length
        fifo = self._fifos[priority]
        if self._lengths[priority] == length and fifo and not self._heaps[priority]:
            # Nearly always: the items have one priority and wait in sequence. Then none is passed over.
            entry = fifo[0]
            item: T | None = entry[_ITEM]
            if item is not None:
                entry[_ITEM] = None
                del fifo[0]
                self.length = self._lengths[priority] = length - 1
                self._passed_over[priority] = 0
                return item
        head = self.head()
        if head is None:
            raise IndexError
        served: T = head[_ITEM]
        self.serve(head)
        return served

    def serve(self, head: QueueEntry, joined_priority: Priority | None = None) -> None:
        """Remove the head as served, which counts against starvation; a removal by `remove` does not.

        Args:
            head: the entry that `head` returned.
            joined_priority: the priority with which it was first pushed, if it has been promoted since. Only lower
                priorities count as passed over by it: else promoted items would starve their own priority.
        """
        priority = int(head[_PRIORITY])
        self._last_served = priority
        self._remove_first(head)
        head[_ITEM] = None
        self._shorten(priority)
        self._passed_over[priority] = 0
        if self.length > self._lengths[priority]:
            self.pass_over(priority if joined_priority is None else joined_priority)

    def pass_over(self, priority: int) -> None:
        """Count the lower priorities that wait as passed over by `priority`."""
        for lower in range(priority + 1, len(Priority)):
            if self._lengths[lower]:
                self._passed_over[lower] += 1

    def _remove_first(self, head: QueueEntry) -> None:
        heap = self._heaps[head[_PRIORITY]]
        if heap and heap[0] is head:
            heapq.heappop(heap)
        else:
            self._fifos[head[_PRIORITY]].popleft()

    def _shorten(self, priority: int) -> None:
        self.length -= 1
        self._lengths[priority] -= 1
        if not self._lengths[priority]:
            self._passed_over[priority] = 0  # an item that is pushed later has not waited

    def _next_priority(self) -> int:
        lengths = self._lengths
        if lengths[self._last_served] == self.length:
            return self._last_served  # all items have this priority
        starving = (priority for priority, passed in enumerate(self._passed_over) if passed >= self._starvation_bound)
        return next(starving, next(priority for priority, length in enumerate(lengths) if length))

    def _first(self, priority: int) -> QueueEntry | None:
        """Return the first entry of a priority that has one, and drop the removed entries before it."""
        heap, fifo = self._heaps[priority], self._fifos[priority]
        while heap and heap[0][_ITEM] is None:
            heapq.heappop(heap)
            self._removed -= 1
        while fifo and fifo[0][_ITEM] is None:
            fifo.popleft()
            self._removed -= 1
        if heap and fifo:
            return min(heap[0], fifo[0])
        return heap[0] if heap else fifo[0]

    def _sweep(self) -> None:
        """Drop all removed entries."""
        for heap in self._heaps:
            heap[:] = [entry for entry in heap if entry[_ITEM] is not None]
            heapq.heapify(heap)
        for fifo in self._fifos:
            live = [entry for entry in fifo if entry[_ITEM] is not None]
            fifo.clear()
            fifo.extend(live)
        self._removed = 0


def heap_in_order(heap: list[E]) -> Iterator[E]:
    """Iterate over a heap, lowest first, without changing it."""
    length = len(heap)
    frontier = [(heap[0], 0)] if heap else []
    while frontier:
        entry, index = frontier[0]
        yield entry
        child = 2 * index + 1
        if child < length:
            heapq.heapreplace(frontier, (heap[child], child))
            if child + 1 < length:
                heapq.heappush(frontier, (heap[child + 1], child + 1))
        else:
            heapq.heappop(frontier)

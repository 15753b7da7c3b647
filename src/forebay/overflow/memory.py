"""The ledger in memory: tasks wait outside the line, and are gone with their process."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec

from forebay.clock import new_id
from forebay.errors import LedgerUnusable
from forebay.overflow.lapse import lapsed
from forebay.storage.url import DEFAULT_BOUND
from forebay.task import Priority
from forebay.typing import Completion, DeadRow, Lease, Put, Row, RowState

_SLACK = 64  # dead items that a heap may hold, however few live ones it has


@dataclass(slots=True, eq=False)
class _Entry:
    """A row, and where it is."""

    row: Row
    turn: int  # grows with each row stored; kept for life
    stamp: int = 0  # changes with its state: items of a heap that bear an older one are dead
    state: RowState = RowState.WAITING
    fence: str | None = None
    until: float = 0.0
    completion: Completion | None = None


class _Heap:
    """Entries in the order of their keys. What died in it goes when it comes up, or when it is the larger part."""

    __slots__ = ("_dead", "_items")

    def __init__(self) -> None:
        self._items: list[tuple[Any, int, _Entry]] = []  # stamps are unique, so entries are never compared
        self._dead = 0

    def push(self, key: Any, entry: _Entry) -> None:
        heapq.heappush(self._items, (key, entry.stamp, entry))

    def died(self) -> None:
        """Take note that an entry in it has changed its stamp."""
        self._dead += 1
        if self._dead > _SLACK and self._dead * 2 > len(self._items):
            self._items = [item for item in self._items if item[1] == item[2].stamp]
            heapq.heapify(self._items)
            self._dead = 0

    def first(self) -> tuple[Any, _Entry] | None:
        """The first live entry with its key."""
        while self._items:
            key, stamp, entry = self._items[0]
            if stamp == entry.stamp:
                return key, entry
            heapq.heappop(self._items)
            self._dead -= 1
        return None

    def live(self) -> Iterator[tuple[Any, _Entry]]:
        """The live entries with their keys, in no particular order."""
        return ((key, entry) for key, stamp, entry in self._items if stamp == entry.stamp)

    def pop(self) -> None:
        """Drop what `first` returned."""
        heapq.heappop(self._items)


class MemoryLedger:
    """A ledger of rows in memory. It keeps them through close() and open(), as long as it lives itself.

    Args:
        bound: rows that may wait or be leased; as many DONE and as many DEAD are kept, the oldest dropped first.
    """

    durable = False

    def __init__(self, *, bound: int = DEFAULT_BOUND) -> None:
        self._bound = bound
        self._is_open = False
        self._entries: dict[str, _Entry] = {}
        self._keys: dict[str, str] = {}
        self._queues: defaultdict[tuple[str, Priority], _Heap] = defaultdict(_Heap)
        self._leased = _Heap()
        self._ended = {RowState.DONE: _Heap(), RowState.DEAD: _Heap()}
        self._sizes = Counter[RowState]()  # of those
        self._depths: Counter[tuple[str, Priority]] = Counter()
        self._next = itertools.count().__next__

    async def open(self) -> None:
        """Let it be used."""
        self._is_open = True

    async def close(self) -> None:
        """Let it be used no more."""
        self._is_open = False

    async def put(self, row: Row, *, fence: str | None = None, until: float = 0.0) -> Put:
        """Store `row`."""
        self._check_open()
        if row.task_id in self._entries or (row.key is not None and row.key in self._keys):
            return Put.DUPLICATE
        if self._full:
            return Put.FULL
        entry = self._entries[row.task_id] = _Entry(row, self._next())
        if row.key is not None:
            self._keys[row.key] = row.task_id
        if fence is None:
            self._wait(entry)
        else:
            self._lease(entry, fence, until)
        return Put.STORED

    async def lease(self, task_type: str, limit: int, *, until: float, rung: Priority | None = None) -> Sequence[Lease]:
        """Lease the best waiting rows of a type."""
        self._check_open()
        leases: list[Lease] = []
        for place in [(task_type, each) for each in (Priority if rung is None else (rung,))]:
            queue = self._queues.get(place)
            while queue is not None and len(leases) < limit and (best := queue.first()) is not None:
                entry = best[1]
                queue.pop()
                self._leave_queue(entry)
                self._lease(entry, new_id(), until)
                leases.append(Lease(row=entry.row, fence=str(entry.fence), until=until))
            if queue is not None and queue.first() is None:
                del self._queues[place]  # task types come and go
        return leases

    async def start(self, lease: Lease) -> bool:
        """Count a start."""
        self._check_open()
        entry = self._held(lease)
        if entry is None:
            return False
        entry.row = msgspec.structs.replace(entry.row, attempts=entry.row.attempts + 1)
        return True

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Extend leases, and return the lost ones."""
        self._check_open()
        lost = []
        for lease in leases:
            entry = self._held(lease)
            if entry is None:
                lost.append(lease)
            else:
                entry.until = max(entry.until, until)  # its item in the heap comes up too early, and is put back then
        return lost

    async def release(self, leases: Sequence[Lease]) -> None:
        """Put rows back where they stood."""
        self._check_open()
        for lease in leases:
            entry = self._held(lease)
            if entry is not None:
                self._leased.died()
                self._wait(entry)

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a row DONE."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.fence != fence or entry.state not in (RowState.WAITING, RowState.LEASED):
            return False
        if entry.state is RowState.WAITING:
            queue = self._queues[entry.row.task_type, entry.row.priority]
            self._leave_queue(entry)
            self._end(entry, RowState.DONE, completion)
            queue.died()
        else:
            self._end(entry, RowState.DONE, completion)
            self._leased.died()
        return True

    async def reap(self, *, now: float, max_attempts: int) -> Sequence[DeadRow]:
        """Take back lapsed rows, and return those that became DEAD."""
        self._check_open()
        dead = []
        while (first := self._leased.first()) is not None and first[0] < now:
            entry = first[1]
            self._leased.pop()
            if entry.until >= now:
                self._leased.push(entry.until, entry)
            elif (completion := lapsed(entry.row, now=now, max_attempts=max_attempts)) is None:
                self._wait(entry)
            else:
                self._end(entry, RowState.DEAD, completion)
                dead.append(DeadRow(row=entry.row, completion=completion))
        return dead

    async def prune(self, *, before: float) -> int:
        """Drop DONE rows that are old enough."""
        self._check_open()
        done, count = self._ended[RowState.DONE], 0
        while (oldest := done.first()) is not None and oldest[0][0] < before:
            self._drop_oldest(RowState.DONE)
            count += 1
        return count

    async def bury(self, lease: Lease, completion: Completion) -> bool:
        """Mark a row DEAD."""
        self._check_open()
        entry = self._held(lease)
        if entry is None:
            return False
        self._end(entry, RowState.DEAD, completion)
        self._leased.died()
        return True

    async def dead(self, limit: int, *, after: tuple[float, str] | None = None) -> Sequence[DeadRow]:
        """A page of the rows that are DEAD."""
        self._check_open()
        behind = (item for item in self._ended[RowState.DEAD].live() if after is None or item[0] > after)
        page = heapq.nsmallest(limit, behind, key=lambda item: item[0])
        return [
            DeadRow(row=msgspec.structs.replace(entry.row, envelope=b""), completion=entry.completion)
            for _, entry in page
            if entry.completion is not None
        ]

    async def requeue(self, task_id: str) -> Put | None:
        """Let a DEAD row wait again."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is not RowState.DEAD:
            return None
        if self._full:
            return Put.FULL
        self._sizes[RowState.DEAD] -= 1
        entry.row = msgspec.structs.replace(entry.row, attempts=0)
        entry.completion = None
        self._wait(entry)
        self._ended[RowState.DEAD].died()
        return Put.STORED

    async def drop(self, task_id: str) -> bool:
        """Drop a DEAD row."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is not RowState.DEAD:
            return False
        entry.stamp = self._next()
        self._ended[RowState.DEAD].died()
        self._forget(entry)
        return True

    async def find(self, task_id: str) -> tuple[RowState, Row, Completion | None] | None:
        """A row by its id."""
        self._check_open()
        entry = self._entries.get(task_id)
        return None if entry is None else (entry.state, entry.row, entry.completion)

    async def find_key(self, key: str) -> str | None:
        """The id stored under a key."""
        self._check_open()
        return self._keys.get(key)

    async def depths(self) -> Mapping[tuple[str, Priority], int]:
        """How many rows wait."""
        self._check_open()
        return dict(self._depths)

    def _check_open(self) -> None:
        if not self._is_open:
            raise LedgerUnusable(where="memory://", why="it is not open", advice="Use it between open() and close().")

    @property
    def _full(self) -> bool:
        return len(self._entries) - self._sizes.total() >= self._bound

    def _held(self, lease: Lease) -> _Entry | None:
        entry = self._entries.get(lease.row.task_id)
        return entry if entry is not None and entry.fence == lease.fence else None

    def _wait(self, entry: _Entry) -> None:
        row = entry.row
        entry.state, entry.fence, entry.stamp = RowState.WAITING, None, self._next()
        self._depths[row.task_type, row.priority] += 1
        due = inf if row.deadline is None else row.deadline
        self._queues[row.task_type, row.priority].push((due, row.enqueued_at, entry.turn), entry)

    def _leave_queue(self, entry: _Entry) -> None:
        place = (entry.row.task_type, entry.row.priority)
        self._depths[place] -= 1
        if not self._depths[place]:
            del self._depths[place]

    def _lease(self, entry: _Entry, fence: str, until: float) -> None:
        entry.state, entry.fence, entry.until, entry.stamp = RowState.LEASED, fence, until, self._next()
        self._leased.push(until, entry)

    def _end(self, entry: _Entry, state: RowState, completion: Completion) -> None:
        entry.state, entry.fence, entry.stamp, entry.completion = state, None, self._next(), completion
        if state is RowState.DONE:
            entry.row = msgspec.structs.replace(entry.row, envelope=b"")
        order = entry.turn if state is RowState.DONE else entry.row.task_id
        self._ended[state].push((completion.finished_at, order), entry)
        self._sizes[state] += 1
        if self._sizes[state] > self._bound:
            self._drop_oldest(state)

    def _drop_oldest(self, state: RowState) -> None:
        oldest = self._ended[state].first()
        if oldest is not None:
            self._ended[state].pop()
            self._forget(oldest[1])

    def _forget(self, entry: _Entry) -> None:
        """Drop an entry that has ended."""
        self._sizes[entry.state] -= 1
        del self._entries[entry.row.task_id]
        if entry.row.key is not None:
            del self._keys[entry.row.key]

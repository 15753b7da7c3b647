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
from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, DeadRecord, Lease, PutResult, RecordState, TaskRecord
from forebay.overflow.lease_expiry import completion_after_expiry
from forebay.storage.url import DEFAULT_BOUND
from forebay.task import Priority

_MIN_STALE = 64  # dead items that a heap may hold, however few live ones it has


@dataclass(slots=True, eq=False)
class _Entry:
    """A row, and where it is."""

    record: TaskRecord
    sequence: int  # grows with each row stored; kept for life
    version: int = 0  # changes with its state: items of a heap that bear an older one are dead
    state: RecordState = RecordState.WAITING
    fence: str | None = None
    until: float = 0.0
    completion: Completion | None = None


class _Heap:
    """Entries in the order of their keys. What died in it goes when it comes up, or when it is the larger part."""

    __slots__ = ("_items", "_stale")

    def __init__(self) -> None:
        self._items: list[tuple[Any, int, _Entry]] = []  # stamps are unique, so entries are never compared
        self._stale = 0

    def push(self, key: Any, entry: _Entry) -> None:
        heapq.heappush(self._items, (key, entry.version, entry))

    def mark_stale(self) -> None:
        """Take note that an entry in it has changed its stamp."""
        self._stale += 1
        if self._stale > _MIN_STALE and self._stale * 2 > len(self._items):
            self._items = [item for item in self._items if item[1] == item[2].version]
            heapq.heapify(self._items)
            self._stale = 0

    def peek(self) -> tuple[Any, _Entry] | None:
        """The first live entry with its key."""
        while self._items:
            key, stamp, entry = self._items[0]
            if stamp == entry.version:
                return key, entry
            heapq.heappop(self._items)
            self._stale -= 1
        return None

    def live(self) -> Iterator[tuple[Any, _Entry]]:
        """The live entries with their keys, in no particular order."""
        return ((key, entry) for key, stamp, entry in self._items if stamp == entry.version)

    def pop(self) -> None:
        """Drop what `first` returned."""
        heapq.heappop(self._items)


class MemoryTaskStore:
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
        self._ended = {RecordState.DONE: _Heap(), RecordState.DEAD: _Heap()}
        self._sizes = Counter[RecordState]()  # of those
        self._depths: Counter[tuple[str, Priority]] = Counter()
        self._next_number = itertools.count().__next__

    async def open(self) -> None:
        """Let it be used."""
        self._is_open = True

    async def close(self) -> None:
        """Let it be used no more."""
        self._is_open = False

    async def put(self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0) -> PutResult:
        """Store `row`."""
        self._check_open()
        if record.task_id in self._entries or (record.key is not None and record.key in self._keys):
            return PutResult.DUPLICATE
        if self._full:
            return PutResult.FULL
        entry = self._entries[record.task_id] = _Entry(record, self._next_number())
        if record.key is not None:
            self._keys[record.key] = record.task_id
        if fence is None:
            self._enqueue(entry)
        else:
            self._lease(entry, fence, until)
        return PutResult.STORED

    async def lease(
        self, task_type: str, limit: int, *, until: float, priority: Priority | None = None
    ) -> Sequence[Lease]:
        """Lease the best waiting rows of a type."""
        self._check_open()
        leases: list[Lease] = []
        for place in [(task_type, each) for each in (Priority if priority is None else (priority,))]:
            queue = self._queues.get(place)
            while queue is not None and len(leases) < limit and (best := queue.peek()) is not None:
                entry = best[1]
                queue.pop()
                self._leave_queue(entry)
                self._lease(entry, new_id(), until)
                leases.append(Lease(record=entry.record, fence=str(entry.fence), until=until))
            if queue is not None and queue.peek() is None:
                del self._queues[place]  # task types come and go
        return leases

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start."""
        self._check_open()
        entry = self._leased_entry(lease)
        if entry is None:
            return False
        entry.record = msgspec.structs.replace(entry.record, attempts=entry.record.attempts + 1)
        return True

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Extend leases, and return the lost ones."""
        self._check_open()
        lost = []
        for lease in leases:
            entry = self._leased_entry(lease)
            if entry is None:
                lost.append(lease)
            else:
                entry.until = max(entry.until, until)  # its item in the heap comes up too early, and is put back then
        return lost

    async def release(self, leases: Sequence[Lease]) -> None:
        """Put rows back where they stood."""
        self._check_open()
        for lease in leases:
            entry = self._leased_entry(lease)
            if entry is not None:
                self._leased.mark_stale()
                self._enqueue(entry)

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a row DONE."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.fence != fence or entry.state not in (RecordState.WAITING, RecordState.LEASED):
            return False
        if entry.state is RecordState.WAITING:
            queue = self._queues[entry.record.task_type, entry.record.priority]
            self._leave_queue(entry)
            self._end(entry, RecordState.DONE, completion)
            queue.mark_stale()
        else:
            self._end(entry, RecordState.DONE, completion)
            self._leased.mark_stale()
        return True

    async def reap(self, *, now: float, max_attempts: int) -> Sequence[DeadRecord]:
        """Take back lapsed rows, and return those that became DEAD."""
        self._check_open()
        dead = []
        while (first := self._leased.peek()) is not None and first[0] < now:
            entry = first[1]
            self._leased.pop()
            if entry.until >= now:
                self._leased.push(entry.until, entry)
            elif (completion := completion_after_expiry(entry.record, now=now, max_attempts=max_attempts)) is None:
                self._enqueue(entry)
            else:
                self._end(entry, RecordState.DEAD, completion)
                dead.append(DeadRecord(record=entry.record, completion=completion))
        return dead

    async def prune(self, *, before: float) -> int:
        """Drop DONE rows that are old enough."""
        self._check_open()
        done, count = self._ended[RecordState.DONE], 0
        while (oldest := done.peek()) is not None and oldest[0][0] < before:
            self._drop_oldest(RecordState.DONE)
            count += 1
        return count

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a row DEAD."""
        self._check_open()
        entry = self._leased_entry(lease)
        if entry is None:
            return False
        self._end(entry, RecordState.DEAD, completion)
        self._leased.mark_stale()
        return True

    async def list_dead(self, limit: int, *, after: tuple[float, str] | None = None) -> Sequence[DeadRecord]:
        """A page of the rows that are DEAD."""
        self._check_open()
        behind = (item for item in self._ended[RecordState.DEAD].live() if after is None or item[0] > after)
        page = heapq.nsmallest(limit, behind, key=lambda item: item[0])
        return [
            DeadRecord(record=msgspec.structs.replace(entry.record, envelope=b""), completion=entry.completion)
            for _, entry in page
            if entry.completion is not None
        ]

    async def requeue(self, task_id: str) -> PutResult | None:
        """Let a DEAD row wait again."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is not RecordState.DEAD:
            return None
        if self._full:
            return PutResult.FULL
        self._sizes[RecordState.DEAD] -= 1
        entry.record = msgspec.structs.replace(entry.record, attempts=0)
        entry.completion = None
        self._enqueue(entry)
        self._ended[RecordState.DEAD].mark_stale()
        return PutResult.STORED

    async def delete_dead(self, task_id: str) -> bool:
        """Drop a DEAD row."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is not RecordState.DEAD:
            return False
        entry.version = self._next_number()
        self._ended[RecordState.DEAD].mark_stale()
        self._remove(entry)
        return True

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """A row by its id."""
        self._check_open()
        entry = self._entries.get(task_id)
        return None if entry is None else (entry.state, entry.record, entry.completion)

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
            raise StoreUnavailable(where="memory://", why="it is not open", advice="Use it between open() and close().")

    @property
    def _full(self) -> bool:
        return len(self._entries) - self._sizes.total() >= self._bound

    def _leased_entry(self, lease: Lease) -> _Entry | None:
        entry = self._entries.get(lease.record.task_id)
        return entry if entry is not None and entry.fence == lease.fence else None

    def _enqueue(self, entry: _Entry) -> None:
        row = entry.record
        entry.state, entry.fence, entry.version = RecordState.WAITING, None, self._next_number()
        self._depths[row.task_type, row.priority] += 1
        due = inf if row.deadline is None else row.deadline
        self._queues[row.task_type, row.priority].push((due, row.enqueued_at, entry.sequence), entry)

    def _leave_queue(self, entry: _Entry) -> None:
        place = (entry.record.task_type, entry.record.priority)
        self._depths[place] -= 1
        if not self._depths[place]:
            del self._depths[place]

    def _lease(self, entry: _Entry, fence: str, until: float) -> None:
        entry.state, entry.fence, entry.until, entry.version = RecordState.LEASED, fence, until, self._next_number()
        self._leased.push(until, entry)

    def _end(self, entry: _Entry, state: RecordState, completion: Completion) -> None:
        entry.state, entry.fence, entry.version, entry.completion = state, None, self._next_number(), completion
        if state is RecordState.DONE:
            entry.record = msgspec.structs.replace(entry.record, envelope=b"")
        order = entry.sequence if state is RecordState.DONE else entry.record.task_id
        self._ended[state].push((completion.finished_at, order), entry)
        self._sizes[state] += 1
        if self._sizes[state] > self._bound:
            self._drop_oldest(state)

    def _drop_oldest(self, state: RecordState) -> None:
        oldest = self._ended[state].peek()
        if oldest is not None:
            self._ended[state].pop()
            self._remove(oldest[1])

    def _remove(self, entry: _Entry) -> None:
        """Drop an entry that has ended."""
        self._sizes[entry.state] -= 1
        del self._entries[entry.record.task_id]
        if entry.record.key is not None:
            del self._keys[entry.record.key]

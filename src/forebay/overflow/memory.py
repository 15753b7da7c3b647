"""The task store in memory: tasks wait outside the queue, and are lost with their process."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec

from forebay.clock import new_id
from forebay.errors import StoreUnavailable
from forebay.interfaces import (
    Completion,
    DeadRecord,
    Lease,
    PutResult,
    RecordState,
    StoredRecord,
    TaskRecord,
    WakeResult,
)
from forebay.overflow.lease_expiry import completion_after_expiry
from forebay.storage.url import DEFAULT_BOUND
from forebay.task import Priority, TaskStatus

_MIN_STALE = 64  # stale items that a heap may hold however few current ones it has


@dataclass(slots=True, eq=False)
class _Entry:
    """A record, and its state."""

    record: TaskRecord
    sequence: int  # grows with each record stored; never changes
    version: int = 0  # changes with the state: an item of a heap with an older version is stale
    state: RecordState = RecordState.WAITING
    fence: str | None = None
    until: float = 0.0  # while LEASED or DELAYED
    completion: Completion | None = None


class _Heap:
    """A heap of entries by key. Stale items are removed at the top, or once they are more than half."""

    __slots__ = ("_items", "_stale")

    def __init__(self) -> None:
        self._items: list[tuple[Any, int, _Entry]] = []  # versions are unique, so entries are never compared
        self._stale = 0

    def push(self, key: Any, entry: _Entry) -> None:
        heapq.heappush(self._items, (key, entry.version, entry))

    def mark_stale(self) -> None:
        """Count an entry of this heap whose version has changed."""
        self._stale += 1
        if self._stale > _MIN_STALE and self._stale * 2 > len(self._items):
            self._items = [item for item in self._items if item[1] == item[2].version]
            heapq.heapify(self._items)
            self._stale = 0

    def peek(self) -> tuple[Any, _Entry] | None:
        """Return the first current entry with its key."""
        while self._items:
            key, version, entry = self._items[0]
            if version == entry.version:
                return key, entry
            heapq.heappop(self._items)
            self._stale -= 1
        return None

    def live(self) -> Iterator[tuple[Any, _Entry]]:
        """Return the current entries with their keys, in no particular order."""
        return ((key, entry) for key, version, entry in self._items if version == entry.version)

    def pop(self) -> None:
        """Remove the entry that `peek` returned."""
        heapq.heappop(self._items)


class MemoryTaskStore:
    """A task store in memory. It keeps its records through close() and open(), as long as the object itself lives.

    Args:
        bound: tasks that may wait or be leased; as many DONE and as many DEAD are kept, the oldest dropped first.
    """

    durable = False

    def __init__(self, *, bound: int = DEFAULT_BOUND) -> None:
        self._bound = bound
        self._is_open = False
        self._entries: dict[str, _Entry] = {}
        self._keys: dict[str, str] = {}
        self._queues: dict[tuple[str, Priority], dict[str, _Heap]] = {}  # of each tenant that has records in it
        self._leased = _Heap()
        self._parked: dict[str, _Heap] = {}  # by thread id
        self._delayed = _Heap()  # by when they are due
        self._delayed_count = 0
        self._heads: dict[str, _Entry] = {}  # by thread id: the entry that is WAITING, LEASED or DELAYED by a retry
        self._unfinished: Counter[str] = Counter()  # entries by thread id
        self._ended = {RecordState.DONE: _Heap(), RecordState.DEAD: _Heap()}
        self._sizes = Counter[RecordState]()  # of the ended records
        self._depths: Counter[tuple[str, Priority, str]] = Counter()
        self._next_number = itertools.count().__next__

    async def open(self) -> None:
        """Allow operations."""
        self._is_open = True

    async def close(self) -> None:
        """Reject further operations."""
        self._is_open = False

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],
        on_lost: Callable[[], None] | None = None,
        on_interrupted: Callable[[], None] | None = None,
    ) -> None:
        """Do nothing: no other process has these records."""

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        """Store `record`."""
        self._check_open()
        known = self._entries.get(record.task_id)
        if known is not None and not _makes_way(known, record.key):
            return PutResult.DUPLICATE
        if record.key is not None and record.key in self._keys:
            return PutResult.DUPLICATE
        if self._full:
            return PutResult.FULL
        if known is not None:
            self._drop(known)
        entry = self._entries[record.task_id] = _Entry(record, self._next_number())
        if record.key is not None:
            self._keys[record.key] = record.task_id
        if record.thread_id is not None:
            self._unfinished[record.thread_id] += 1
        if fence is not None:
            self._put_leased(entry, fence, until)
        elif record.not_before is not None and record.not_before > now:
            self._delay(entry, record.not_before)
        else:
            self._wait(entry)
        return PutResult.PARKED if entry.state is RecordState.PARKED else PutResult.STORED

    def _put_leased(self, entry: _Entry, fence: str, until: float) -> None:
        """Make a new entry LEASED, unless others of its conversation go before it."""
        queue = None
        if entry.record.thread_id is not None:
            self._wait(entry)
            if entry.state is RecordState.PARKED:
                return
            queue = self._leave(entry)
        self._lease(entry, fence, until)
        if queue is not None:
            queue.mark_stale()

    async def lease(
        self,
        task_type: str,
        limit: int,
        *,
        until: float,
        priority: Priority | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Sequence[Lease]:
        """Lease the best waiting records of a task type."""
        self._check_open()
        leases: list[Lease] = []
        for key in [(task_type, each) for each in (Priority if priority is None else (priority,))]:
            if shares is None:
                leases += self._lease_best(key, tuple(self._queues.get(key, ())), limit - len(leases), until)
            for tenant, share in (shares or {}).items():
                leases += self._lease_best(key, (tenant,), min(share, limit - len(leases)), until)
        return leases

    def _lease_best(
        self, key: tuple[str, Priority], tenants: Sequence[str], limit: int, until: float
    ) -> Sequence[Lease]:
        """Lease the best waiting records of `tenants`, whosever they are."""
        leases: list[Lease] = []
        while len(leases) < limit:
            queues = self._queues.get(key, {})
            heads = [(head[0], tenant) for tenant in tenants if tenant in queues and (head := queues[tenant].peek())]
            if not heads:
                break
            queue = queues[min(heads)[1]]
            _, entry = queue.peek() or (None, None)
            assert entry is not None  # noqa: S101 - it is one of the heads
            queue.pop()
            self._count_left(entry)
            self._lease(entry, new_id(), until)
            leases.append(Lease(record=entry.record, fence=str(entry.fence), until=until))
        return leases

    async def lease_ids(self, task_ids: Sequence[str], *, until: float) -> Sequence[Lease]:
        """Lease the waiting ones of given records."""
        self._check_open()
        leases: list[Lease] = []
        for task_id in task_ids:
            entry = self._entries.get(task_id)
            if entry is not None and entry.state is RecordState.WAITING:
                queue = self._leave(entry)
                self._lease(entry, new_id(), until)
                queue.mark_stale()
                leases.append(Lease(record=entry.record, fence=str(entry.fence), until=until))
        return leases

    async def replace(
        self, lease: Lease, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult | None:
        """Put a record in place of a leased one."""
        self._check_open()
        entry = self._leased_entry(lease)
        if entry is None:
            return None
        entry.version = self._next_number()
        self._leased.mark_stale()
        del self._entries[record.task_id]
        if entry.record.key is not None:
            del self._keys[entry.record.key]
        return await self.put(record, fence=fence, until=until, now=now)

    async def set_envelope(self, task_id: str, envelope: bytes) -> bool:
        """Replace the envelope of a record that is not DONE."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is RecordState.DONE:
            return False
        entry.record = msgspec.structs.replace(entry.record, envelope=envelope)
        return True

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start of the handler."""
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
                if until < entry.until:
                    self._leased.mark_stale()
                    self._lease(entry, lease.fence, until)
                entry.until = until  # later: its item in the heap comes up too early, and reap pushes it again
        return lost

    async def release(self, leases: Sequence[Lease]) -> None:
        """Make leased records WAITING again, in their old order."""
        self._check_open()
        for lease in leases:
            entry = self._leased_entry(lease)
            if entry is not None:
                entry.record = msgspec.structs.replace(_with_failures(entry, lease), attempts=lease.record.attempts)
                self._leased.mark_stale()
                self._wait(entry)

    async def record_failures(self, lease: Lease) -> bool:
        """Give a leased record the failures of its lease."""
        self._check_open()
        entry = self._leased_entry(lease)
        if entry is None:
            return False
        entry.record = _with_failures(entry, lease)
        return True

    async def delay(self, lease: Lease, *, due: float) -> bool:
        """Make a leased record DELAYED until `due`."""
        self._check_open()
        entry = self._leased_entry(lease)
        if entry is None:
            return False
        entry.record = _with_failures(entry, lease)
        self._delay(entry, due)
        self._leased.mark_stale()
        return True

    def _delay(self, entry: _Entry, due: float) -> None:
        entry.state, entry.fence, entry.until = RecordState.DELAYED, None, due
        entry.version = self._next_number()
        self._delayed.push(due, entry)
        self._delayed_count += 1

    async def wake(self, *, now: float) -> WakeResult:
        """Make the DELAYED records that are due WAITING again."""
        self._check_open()
        woken = 0
        while (first := self._delayed.peek()) is not None and first[0] <= now:
            self._delayed.pop()
            self._delayed_count -= 1
            self._wait(first[1])
            woken += 1
        return WakeResult(woken=woken, delayed=self._delayed_count, next_due=None if first is None else first[0])

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a record DONE."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.fence != fence or entry.state in self._ended:
            return False
        heap = self._leased
        if entry.state is not RecordState.LEASED:
            heap = self._leave(entry)
        self._end(entry, RecordState.DONE, completion)
        heap.mark_stale()
        return True

    async def reap(self, *, now: float, max_attempts: int, latest: float = inf) -> Sequence[DeadRecord]:
        """Release expired leases, and return the records that became DEAD."""
        self._check_open()
        dead = []
        if latest < inf:
            for _, entry in list(self._leased.live()):
                if entry.until > latest:
                    self._leased.mark_stale()
                    self._lease(entry, str(entry.fence), -inf)
        while (first := self._leased.peek()) is not None and first[0] < now:
            entry = first[1]
            self._leased.pop()
            if entry.until >= now:
                self._leased.push(entry.until, entry)
                continue
            completion = completion_after_expiry(entry.record, now=now, max_attempts=max_attempts)
            if completion is None:
                self._wait(entry)
            else:
                self._end(entry, RecordState.DEAD, completion)
                dead.append(DeadRecord(record=entry.record, completion=completion))
        return dead

    async def prune(self, *, before: float) -> int:
        """Drop DONE records that ended before `before`."""
        self._check_open()
        done, count = self._ended[RecordState.DONE], 0
        while (oldest := done.peek()) is not None and oldest[0][0] < before:
            self._drop_oldest(RecordState.DONE)
            count += 1
        return count

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a leased record DEAD."""
        self._check_open()
        entry = self._leased_entry(lease)
        if entry is None:
            return False
        self._end(entry, RecordState.DEAD, completion)
        self._leased.mark_stale()
        return True

    async def list_records(
        self, state: RecordState, limit: int, *, after: tuple[float, str] | None = None
    ) -> Sequence[StoredRecord]:
        """Return a page of the records in a state."""
        self._check_open()
        entries = (entry for entry in self._entries.values() if entry.state is state)
        timed = state in (RecordState.LEASED, RecordState.DELAYED)
        listed = (
            StoredRecord(record=entry.record, completion=entry.completion, until=entry.until if timed else None)
            for entry in entries
        )
        behind = (each for each in listed if after is None or each.position > after)
        page = heapq.nsmallest(limit, behind, key=lambda each: each.position)
        return [
            msgspec.structs.replace(each, record=msgspec.structs.replace(each.record, envelope=b"")) for each in page
        ]

    async def requeue(self, task_id: str) -> PutResult | None:
        """Make a DEAD record WAITING again."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is not RecordState.DEAD:
            return None
        if entry.record.key in self._keys:
            return PutResult.DUPLICATE
        if self._full:
            return PutResult.FULL
        self._sizes[RecordState.DEAD] -= 1
        entry.record = msgspec.structs.replace(
            entry.record, attempts=0, failures=0, total_delay=0.0, last_error=None, usage=None
        )
        entry.completion = None
        if entry.record.key is not None:
            self._keys[entry.record.key] = task_id
        if entry.record.thread_id is not None:
            self._unfinished[entry.record.thread_id] += 1
        self._wait(entry)
        self._ended[RecordState.DEAD].mark_stale()
        return PutResult.STORED

    async def delete_dead(self, task_id: str) -> bool:
        """Delete a DEAD record."""
        self._check_open()
        entry = self._entries.get(task_id)
        if entry is None or entry.state is not RecordState.DEAD:
            return False
        self._drop(entry)
        return True

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """Return a record by its task id."""
        self._check_open()
        entry = self._entries.get(task_id)
        return None if entry is None else (entry.state, entry.record, entry.completion)

    async def find_key(self, key: str) -> str | None:
        """Return the task id stored under a key."""
        self._check_open()
        return self._keys.get(key)

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        """Return how many records are WAITING."""
        self._check_open()
        return dict(self._depths)

    async def leased(self) -> Mapping[str, int]:
        """Return how many records are LEASED."""
        self._check_open()
        return Counter(entry.record.task_type for _, entry in self._leased.live())

    async def conversations(self) -> Mapping[str, int]:
        """Return how many records have not ended, by thread id."""
        self._check_open()
        return dict(self._unfinished)

    def _check_open(self) -> None:
        if not self._is_open:
            raise StoreUnavailable(where="memory://", why="it is not open", advice="Use it between open() and close().")

    @property
    def _full(self) -> bool:
        return len(self._entries) - self._sizes.total() >= self._bound

    def _leased_entry(self, lease: Lease) -> _Entry | None:
        entry = self._entries.get(lease.record.task_id)
        return entry if entry is not None and entry.fence == lease.fence else None

    def _wait(self, entry: _Entry) -> None:
        """Make an entry WAITING, unless others of its conversation go before it."""
        thread_id = entry.record.thread_id
        if thread_id is None:
            self._enqueue(entry)
            return
        if self._heads.get(thread_id) is entry:
            del self._heads[thread_id]
        self._park(entry, thread_id)
        self._settle(thread_id)

    def _park(self, entry: _Entry, thread_id: str) -> None:
        entry.state, entry.fence, entry.version = RecordState.PARKED, None, self._next_number()
        self._parked.setdefault(thread_id, _Heap()).push(_age(entry), entry)

    def _settle(self, thread_id: str) -> None:
        """Make the oldest entry of a conversation WAITING, unless one is LEASED or DELAYED."""
        head, parked = self._heads.get(thread_id), self._parked.get(thread_id)
        oldest = None if parked is None else parked.peek()
        if parked is None or oldest is None:
            self._parked.pop(thread_id, None)
            return
        if head is not None:
            if head.state is not RecordState.WAITING or _age(head) < oldest[0]:
                return
            queue = self._leave(head)
            self._park(head, thread_id)
            queue.mark_stale()
        parked.pop()
        self._heads[thread_id] = oldest[1]
        self._enqueue(oldest[1])
        if parked.peek() is None:
            del self._parked[thread_id]

    def _leave(self, entry: _Entry) -> _Heap:
        """Return the heap of an entry that is not LEASED and leaves it: the caller marks it stale there."""
        record = entry.record
        if entry.state is RecordState.PARKED and record.thread_id is not None:
            return self._parked[record.thread_id]
        if entry.state is RecordState.DELAYED:
            self._delayed_count -= 1
            return self._delayed
        queue = self._queues[record.task_type, record.priority][record.tenant]
        self._count_left(entry)
        return queue

    def _enqueue(self, entry: _Entry) -> None:
        record = entry.record
        entry.state, entry.fence, entry.version = RecordState.WAITING, None, self._next_number()
        self._depths[record.task_type, record.priority, record.tenant] += 1
        due = inf if record.deadline is None else record.deadline
        queues = self._queues.setdefault((record.task_type, record.priority), {})
        queues.setdefault(record.tenant, _Heap()).push((due, record.enqueued_at, entry.sequence), entry)

    def _count_left(self, entry: _Entry) -> None:
        """Count that `entry` has left its queue, which is forgotten with its last one: types and tenants go."""
        task_type, priority, tenant = key = (entry.record.task_type, entry.record.priority, entry.record.tenant)
        self._depths[key] -= 1
        if not self._depths[key]:
            del self._depths[key], self._queues[task_type, priority][tenant]
            if not self._queues[task_type, priority]:
                del self._queues[task_type, priority]

    def _lease(self, entry: _Entry, fence: str, until: float) -> None:
        entry.state, entry.fence, entry.until = RecordState.LEASED, fence, until
        entry.version = self._next_number()
        self._leased.push(until, entry)
        if entry.record.thread_id is not None:
            self._heads[entry.record.thread_id] = entry

    def _end(self, entry: _Entry, state: RecordState, completion: Completion) -> None:
        entry.state, entry.fence, entry.completion = state, None, completion
        entry.version = self._next_number()
        if (thread_id := entry.record.thread_id) is not None:
            self._unfinished[thread_id] -= 1
            if not self._unfinished[thread_id]:
                del self._unfinished[thread_id]
            if self._heads.get(thread_id) is entry:
                del self._heads[thread_id]
            self._settle(thread_id)
        succeeded = completion.status == TaskStatus.SUCCEEDED.value
        if entry.record.key is not None and not (state is RecordState.DONE and succeeded):
            del self._keys[entry.record.key]
        if state is RecordState.DONE:
            key = entry.record.key if succeeded else None
            entry.record = msgspec.structs.replace(entry.record, envelope=b"", key=key)
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

    def _drop(self, entry: _Entry) -> None:
        """Remove an entry that has ended, wherever it is in its heap."""
        entry.version = self._next_number()
        self._ended[entry.state].mark_stale()
        self._remove(entry)

    def _remove(self, entry: _Entry) -> None:
        """Remove an entry that has ended."""
        self._sizes[entry.state] -= 1
        del self._entries[entry.record.task_id]
        if entry.record.key is not None and entry.state is RecordState.DONE:
            del self._keys[entry.record.key]


def _makes_way(entry: _Entry, key: str | None) -> bool:
    """Return whether an entry is removed for a record of the same task id with `key`."""
    if entry.state is RecordState.DEAD:
        return key is not None and entry.record.key == key
    return entry.state is RecordState.DONE and entry.record.key is None


def _with_failures(entry: _Entry, lease: Lease) -> TaskRecord:
    """Return the record of an entry with the failures of the lease on it."""
    known = lease.record
    return msgspec.structs.replace(
        entry.record,
        failures=known.failures,
        total_delay=known.total_delay,
        last_error=known.last_error,
        usage=known.usage,
    )


def _age(entry: _Entry) -> tuple[float, int]:
    """Return the key that orders the entries of one conversation."""
    return entry.record.enqueued_at, entry.sequence

"""The task store in a SQLite file: tasks survive their process, and processes on one machine share them."""

# ruff: noqa: S608 - statements are built from constants; every value is a parameter

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf, isinf
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from forebay._text import is_unicode
from forebay.call_usage import CallUsage
from forebay.clock import new_id, wall_time
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
from forebay.overflow.sqlite_schema import SCHEMA, STATES
from forebay.storage.batch_statement import BatchStatement
from forebay.storage.commit_watch import CommitWatch
from forebay.storage.sqlite_writer import SqliteWriter
from forebay.storage.url import DEFAULT_BOUND, Fsync
from forebay.task import Priority, TaskStatus

_BATCH = 500  # rows that reap, wake and prune take at once, so that no other operation waits long behind them

_MIN_RETENTION = 600.0  # seconds for which results are kept though the disk is nearly full

_ROW = (
    "task_id, task_type, priority, envelope, enqueued_at, due, key, attempts, thread_id,"
    " failures, total_delay, last_error, usage, not_before, tenant"
)
_COLUMNS = 15  # of _ROW

# Not INSERT OR IGNORE: that would also apply to the statements of the triggers.
_PUT = BatchStatement(
    f"""
    INSERT INTO task ({_ROW}, state, fence, until)
    SELECT * FROM (VALUES {{rows}}) AS given WHERE column1 IS NOT NULL ON CONFLICT DO NOTHING
    """,
    18,
)
_STATE_SCHEDULED, _STATE_PARKED, _STATE_WAITING, _STATE_LEASED = -3, -1, 0, 1
_STATE = "SELECT state FROM task WHERE task_id = ?"
# A conversation in which no record is leased or delayed has its oldest waiting: see `_settle`.
_DEMOTE = """
UPDATE task SET state = -1 WHERE thread_id = ? AND state IN (-2, 0, 1) AND state = 0 AND EXISTS (
    SELECT 1 FROM task AS other
    WHERE other.thread_id = task.thread_id AND other.state = -1
        AND (other.enqueued_at, other.sequence) < (task.enqueued_at, task.sequence)
)
"""
_NO_HEAD = "NOT EXISTS (SELECT 1 FROM task AS head WHERE head.thread_id = ? AND head.state IN (-2, 0, 1))"
_PROMOTE = f"""
UPDATE task SET state = 0 WHERE sequence = (
    SELECT sequence FROM task WHERE thread_id = ? AND state = -1 ORDER BY enqueued_at, sequence LIMIT 1
) AND {_NO_HEAD}
"""
_LEASE_ONE = "UPDATE task SET state = 1, fence = ?, until = ? WHERE task_id = ? AND state = 0"
_HEADS = "SELECT thread_id FROM task WHERE thread_id IS NOT NULL AND state IN (-2, 0, 1)"
_PARKED = "SELECT thread_id, count(*) FROM task WHERE state = -1 GROUP BY thread_id"
_SCHEDULED = "SELECT thread_id, count(*) FROM task WHERE thread_id IS NOT NULL AND state = -3 GROUP BY thread_id"
_REUSABLE = "iif(state = 3, coalesce(key = ?, 0), state = 2 AND key IS NULL)"  # its id may be given to a new record
_KEY_TAKEN = "EXISTS (SELECT 1 FROM task WHERE key = ? AND state < 3)"
_TAKEN = f"SELECT EXISTS (SELECT 1 FROM task WHERE task_id = ? AND NOT {_REUSABLE}) OR {_KEY_TAKEN}"
_MAKE_WAY = f"DELETE FROM task WHERE task_id = ? AND {_REUSABLE} AND NOT {_KEY_TAKEN}"
_HELD = "SELECT tasks FROM size WHERE kind = 0"
_RAISE_BOUND = "UPDATE bound SET tasks = ? WHERE id = 0 AND tasks < ?"
_STORED = "UPDATE size SET tasks = tasks + ? WHERE kind = 0"
_ENTERED = "INSERT INTO depth VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET waiting = waiting + excluded.waiting"
_LEASE = f"""
UPDATE task SET state = 1, until = ?, fence = ? || '-' || sequence
WHERE sequence IN (
    SELECT sequence FROM task WHERE state = 0 AND task_type = ? AND priority BETWEEN ? AND ?
    ORDER BY priority, due, enqueued_at, sequence LIMIT ?
)
RETURNING {_ROW}, fence, sequence
"""
_LEASE_SHARE = _LEASE.replace("priority BETWEEN ? AND ?", "priority = ? AND tenant = ?")
_LEASE_ID = f"""
UPDATE task SET state = 1, until = ?, fence = ? || '-' || sequence WHERE task_id = ? AND state = 0
RETURNING {_ROW}, fence
"""
_DELETE_LEASED = "DELETE FROM task WHERE task_id = ? AND fence = ? AND state = 1"
_SET_ENVELOPE = "UPDATE task SET envelope = ? WHERE task_id = ? AND state <> 2"
_BY_HOLDER = "FROM (VALUES {rows}) AS given WHERE task_id = column1 AND fence = column2 AND state = 1"
_BEGIN_ATTEMPT = BatchStatement(f"UPDATE task SET attempts = attempts + 1 {_BY_HOLDER}", 2)
_RENEW = BatchStatement(f"UPDATE task SET until = column3 {_BY_HOLDER}", 3)
_RELEASE = BatchStatement(
    f"""
    UPDATE task SET state = 0, fence = NULL, until = NULL, attempts = column3, failures = column4,
        total_delay = column5, last_error = column6, usage = column7
    {_BY_HOLDER}
    """,
    7,
)
# A row that is not leased has no fence, so IS finds it for a caller without one.
_FINISH = BatchStatement(
    """
    UPDATE task SET state = 2, fence = NULL, until = NULL, finished_at = column3, completion = column4, envelope = x'',
        key = iif(column5, key, NULL)
    FROM (VALUES {rows}) AS given WHERE task_id = column1 AND fence IS column2 AND state < 2
    """,
    5,
)
_FAILURES = "failures = ?, total_delay = ?, last_error = ?, usage = ?"
_RECORD_FAILURES = f"UPDATE task SET {_FAILURES} WHERE task_id = ? AND fence = ? AND state = 1"
_DELAY = f"""
UPDATE task SET state = -2, fence = NULL, until = ?, {_FAILURES} WHERE task_id = ? AND fence = ? AND state = 1
"""
_DUE = "SELECT sequence, thread_id FROM task WHERE state < -1 AND until <= ? ORDER BY until LIMIT ?"
_WAKE = "UPDATE task SET state = iif(thread_id IS NULL, 0, -1), until = NULL WHERE sequence = ?"
_DELAYED = "SELECT count(*), min(until) FROM task WHERE state < -1"
_MARK_DEAD = "UPDATE task SET state = 3, fence = NULL, until = NULL, finished_at = ?, completion = ? WHERE sequence = ?"
_EXPIRED = f"SELECT {_ROW}, sequence FROM task WHERE state = 1 AND until < ? ORDER BY until LIMIT ?"
_TOO_LATE = f"SELECT {_ROW}, sequence FROM task WHERE state = 1 AND until > ? ORDER BY until LIMIT ?"
_REQUEUE_EXPIRED = "UPDATE task SET state = 0, fence = NULL, until = NULL WHERE sequence = ?"
# Not fewer than another process keeps.
_KEPT = "max(?, (SELECT tasks FROM bound WHERE id = 0))"
_OLDEST_DONE = "SELECT sequence FROM task WHERE state = 2 ORDER BY finished_at, sequence"
_OLDEST_DEAD = "SELECT sequence FROM task WHERE state = 3 ORDER BY finished_at, task_id"
_EXCESS_DONE = f"max(0, (SELECT tasks FROM size WHERE kind = 1) - {_KEPT})"
_EXCESS_DEAD = f"max(0, (SELECT tasks FROM size WHERE kind = 2) - {_KEPT})"
_TRIM_DONE = f"DELETE FROM task WHERE sequence IN ({_OLDEST_DONE} LIMIT {_EXCESS_DONE})"
_TRIM_DEAD = f"DELETE FROM task WHERE sequence IN ({_OLDEST_DEAD} LIMIT {_EXCESS_DEAD})"
_PRUNE = """
DELETE FROM task WHERE sequence IN (
    SELECT sequence FROM task WHERE state = 2 AND finished_at < ? ORDER BY finished_at LIMIT ?
)
"""
_MARK_LEASED_DEAD = """
UPDATE task SET state = 3, fence = NULL, until = NULL, finished_at = ?, completion = ?
WHERE task_id = ? AND fence = ? AND state = 1
"""
_LIST = {
    state: f"""
    SELECT {_ROW.replace("envelope", "x''")}, until, completion FROM task
    WHERE {condition} AND ({time}, task_id) > (?, ?) ORDER BY {time}, task_id LIMIT ?
    """
    for state, condition, time in (
        (RecordState.WAITING, "state = 0", "enqueued_at"),
        (RecordState.PARKED, "state = -1", "enqueued_at"),
        (RecordState.LEASED, "state = 1", "enqueued_at"),
        (RecordState.DELAYED, "state < -1", "enqueued_at"),
        (RecordState.DONE, "state = 2", "finished_at"),
        (RecordState.DEAD, "state = 3", "finished_at"),
    )
}
_IS_DEAD = "SELECT 1 FROM task WHERE task_id = ? AND state = 3"
_DEAD_KEY_TAKEN = """
SELECT 1 FROM task AS dead JOIN task AS other ON other.key = dead.key AND other.state < 3 WHERE dead.task_id = ?
"""
_REQUEUE = """
UPDATE task SET state = iif(thread_id IS NULL, 0, -1), attempts = 0, finished_at = NULL, completion = NULL,
    failures = 0, total_delay = 0, last_error = NULL, usage = NULL
WHERE task_id = ? AND state = 3 RETURNING thread_id
"""
_DELETE_DEAD = "DELETE FROM task WHERE task_id = ? AND state = 3"
_FIND = f"SELECT {_ROW}, state, completion FROM task WHERE task_id = ?"
_FIND_KEY = "SELECT task_id FROM task WHERE key = ? AND state < 3"
_DEPTHS = "SELECT task_type, priority, tenant, waiting FROM depth WHERE waiting > 0"
_LEASED = "SELECT task_type, count(*) FROM task WHERE state = 1 GROUP BY task_type"
_DELETE_EMPTY_DEPTHS = "DELETE FROM depth WHERE waiting = 0"

# A record; its fence and until when, if it is put LEASED; the present time.
_PutItem: TypeAlias = tuple[TaskRecord, str | None, float, float]
# Task id, fence, epoch seconds, encoded completion, whether it keeps its key.
_FinishItem: TypeAlias = tuple[str, str | None, float, bytes, bool]

_ANY_WAITING = "SELECT EXISTS (SELECT 1 FROM depth WHERE waiting > 0)"
# Changes with the end of any record: their number alone is always that of the bound, once it is reached.
_ENDED = """
SELECT (SELECT sum(tasks) FROM size WHERE kind > 0), (SELECT max(finished_at) FROM task WHERE state = 2),
    (SELECT max(finished_at) FROM task WHERE state = 3)
"""
_Ended: TypeAlias = tuple[int, float | None, float | None]
_Changes: TypeAlias = tuple[bool, _Ended]

_encode = msgspec.msgpack.Encoder().encode
_decode_completion = msgspec.msgpack.Decoder(Completion).decode
_decode_usage = msgspec.msgpack.Decoder(CallUsage).decode


class SqliteTaskStore:
    """A task store in a SQLite file, safe to share between processes on one machine.

    Args:
        path: the file; it is created if missing.
        bound: tasks that may wait or be leased when this process puts one. As many DONE and as many DEAD are kept, the
            oldest dropped first; of several processes, by the largest bound.
        fsync: what an acknowledged write survives, see `Fsync`.
    """

    def __init__(self, path: Path, *, bound: int = DEFAULT_BOUND, fsync: Fsync = Fsync.YES) -> None:
        self._bound = bound
        self._path = path
        self._writer = SqliteWriter(path, SCHEMA, fsync=fsync)
        self._listeners: tuple[Callable[[], None], Callable[[], None]] | None = None  # of waiting and of ended records
        self._watch: CommitWatch[_Changes] | None = None  # while the file is open and somebody has subscribed
        self._ended: _Ended | None = None  # the records that had ended at the last look
        self._put = partial(_put, bound, self._writer.check_growth)
        self._requeue = partial(_requeue, bound, self._writer.check_growth)
        self._finish = partial(_finish, bound)

    @property
    def durable(self) -> bool:
        """False once the file was removed, replaced or emptied while it was open: its records end with this process."""
        try:
            self._writer.check_file()
        except StoreUnavailable:
            return False
        return True

    async def open(self) -> None:
        """Open the file."""
        await self._writer.open()
        self._watch_commits()

    async def close(self) -> None:
        """Finish the pending operations and close the file."""
        self._stop_watching()
        await self._writer.close()

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],
        on_lost: Callable[[], None] | None = None,  # noqa: ARG002
        on_interrupted: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> None:
        """Call back within about 20 ms of a commit of another process.

        On waiting records while there are any, whether or not it was this commit that stored them.
        """
        self._listeners = on_waiting, on_ended
        if self._writer.is_open:
            self._watch_commits()

    def _watch_commits(self) -> None:
        self._stop_watching()
        if self._listeners is not None:
            self._watch = CommitWatch(self._path, self._writer, _changes, self._on_commit)

    def _on_commit(self, changes: _Changes) -> None:
        assert self._listeners is not None  # noqa: S101 - nobody watches otherwise
        on_waiting, on_ended = self._listeners
        waiting, ended = changes
        before, self._ended = self._ended, ended
        if waiting:
            on_waiting()
        if ended != before:
            on_ended()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        """Store `record`, where another process finds it."""
        put = await self._writer.run_batched(self._put, (record, fence, until, now))
        self._writer.check_file()
        return put

    async def lease(
        self,
        task_type: str,
        limit: int,
        *,
        until: float,
        priority: Priority | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Sequence[Lease]:
        """Lease the best waiting records of a task type. Cancelled, release what was leased after all."""
        if limit <= 0:
            return ()
        priorities = (min(Priority), max(Priority)) if priority is None else (priority, priority)
        return await self._hold(self._writer.run(partial(_lease, task_type, priorities, limit, shares, until)))

    async def lease_ids(self, task_ids: Sequence[str], *, until: float) -> Sequence[Lease]:
        """Lease the waiting ones of given records. Cancelled, release what was leased after all."""
        known = [task_id for task_id in task_ids if is_unicode(task_id)]
        return await self._hold(self._writer.run(partial(_lease_ids, known, until))) if known else ()

    async def _hold(self, leasing: asyncio.Future[Sequence[Lease]]) -> Sequence[Lease]:
        """Return the leases that are being made; if cancelled, release them once they are made."""
        try:
            return await asyncio.shield(leasing)
        except asyncio.CancelledError:
            leasing.add_done_callback(self._release_late_leases)
            raise

    def _release_late_leases(self, leasing: asyncio.Future[Sequence[Lease]]) -> None:
        if leasing.cancelled() or leasing.exception() is not None or not leasing.result():
            return
        with suppress(StoreUnavailable):  # closed in the meantime: the leases expire
            self._writer.run(partial(_release, leasing.result()))

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start of the handler."""
        return await self._writer.run_batched(_begin_attempt, lease)

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Extend leases, and return the lost ones. Blocks; from any thread."""
        return self._writer.run_now(partial(_renew, leases, until))

    async def release(self, leases: Sequence[Lease]) -> None:
        """Make leased records WAITING again, in their old order."""
        await self._writer.run(partial(_release, leases))

    async def record_failures(self, lease: Lease) -> bool:
        """Give a leased record the failures of its lease."""
        return await self._writer.run(partial(_record_failures, lease))

    async def delay(self, lease: Lease, *, due: float) -> bool:
        """Make a leased record DELAYED until `due`."""
        return await self._writer.run(partial(_delay, lease, due))

    async def wake(self, *, now: float) -> WakeResult:
        """Make the DELAYED records that are due WAITING again."""
        woken = 0
        while True:
            count, (delayed, next_due) = await self._writer.run(partial(_wake, now))
            woken += count
            if count < _BATCH:
                return WakeResult(woken=woken, delayed=delayed, next_due=next_due)

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a record DONE."""
        succeeded = completion.status == TaskStatus.SUCCEEDED.value
        item = (task_id, fence, completion.finished_at, _encode(completion), succeeded)
        return await self._writer.run_batched(self._finish, item)

    async def reap(self, *, now: float, max_attempts: int, latest: float = inf) -> Sequence[DeadRecord]:
        """Release expired leases, and return the records that became DEAD."""
        dead: list[DeadRecord] = []
        while True:
            count, more = await self._writer.run(partial(_reap, now, latest, max_attempts, self._bound))
            dead += more
            if count < _BATCH:
                return dead

    async def prune(self, *, before: float) -> int:
        """Drop DONE records that ended before `before`; on a disk that is nearly full, those of ten minutes ago too."""
        total = 0
        while True:
            count = await self._writer.run(partial(_prune, before, self._writer.nearly_full))
            total += count
            if count < _BATCH:
                return total

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a leased record DEAD."""
        return await self._writer.run(partial(_mark_dead, self._bound, lease, completion))

    async def list_records(
        self, state: RecordState, limit: int, *, after: tuple[float, str] | None = None
    ) -> Sequence[StoredRecord]:
        """Return a page of the records in a state."""
        return await self._writer.run(partial(_list_records, state, limit, after), writes=False)

    async def requeue(self, task_id: str) -> PutResult | None:
        """Make a DEAD record WAITING again."""
        return await self._writer.run(partial(self._requeue, task_id)) if is_unicode(task_id) else None

    async def delete_dead(self, task_id: str) -> bool:
        """Delete a DEAD record."""
        return is_unicode(task_id) and await self._writer.run(partial(_delete_dead, task_id))

    async def replace(
        self, lease: Lease, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult | None:
        """Put a record in place of a leased one."""
        return await self._writer.run(partial(_replace, self._put, lease, (record, fence, until, now)))

    async def set_envelope(self, task_id: str, envelope: bytes) -> bool:
        """Replace the envelope of a record that is not DONE."""
        return is_unicode(task_id) and await self._writer.run(partial(_set_envelope, task_id, envelope))

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """Return a record by its task id."""
        # What is not valid Unicode was never stored, and SQLite cannot be asked for it.
        return await self._writer.run(partial(_find, task_id), writes=False) if is_unicode(task_id) else None

    async def find_key(self, key: str) -> str | None:
        """Return the task id stored under a key."""
        return await self._writer.run(partial(_find_key, key), writes=False) if is_unicode(key) else None

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        """Return how many records are WAITING."""
        return await self._writer.run(_depths, writes=False)

    async def leased(self) -> Mapping[str, int]:
        """Return how many records are LEASED."""
        return await self._writer.run(_leased, writes=False)

    async def conversations(self) -> Mapping[str, int]:
        """Return how many records have not ended, by thread id."""
        return await self._writer.run(_conversations, writes=False)


def _changes(connection: sqlite3.Connection) -> _Changes:
    (waiting,) = connection.execute(_ANY_WAITING).fetchone()
    return bool(waiting), connection.execute(_ENDED).fetchone()


_DUPLICATE_OR_STORED = (PutResult.DUPLICATE, PutResult.STORED)


def _put(
    bound: int,
    check_growth: Callable[[sqlite3.Connection], None],
    connection: sqlite3.Connection,
    items: Sequence[_PutItem],
) -> Sequence[PutResult]:
    check_growth(connection)
    (held,) = connection.execute(_HELD).fetchone()
    capacity = bound - held
    rows = [_row(*item) for item in items]
    if len(rows) <= capacity:
        results = [_DUPLICATE_OR_STORED[stored] for stored in _insert(connection, rows)]
    else:
        results = _put_one_by_one(capacity, connection, rows)
    inserted = [values for values, result in zip(rows, results, strict=True) if result is PutResult.STORED]
    # By task type, priority and tenant.
    waiting = Counter([(*values[1:3], values[_COLUMNS - 1]) for values in inserted if not values[_COLUMNS]])
    connection.executemany(_ENTERED, [(*queue, count) for queue, count in waiting.items()])
    connection.execute(_STORED, (len(inserted),))
    connection.execute(_RAISE_BOUND, (bound, bound))
    talking = [index for index, row in enumerate(rows) if row[_COLUMNS] == _STATE_PARKED]
    return _enter_conversations(connection, items, results, talking) if talking else results


def _row(record: TaskRecord, fence: str | None, until: float, now: float) -> tuple[Any, ...]:
    """Return the values of a new row: those of _ROW, state, fence and until."""
    not_before = record.not_before
    if fence is None and not_before is not None and not_before > now:
        state, until_column = _STATE_SCHEDULED, not_before
    elif record.thread_id is not None:  # until it has its place in its conversation
        state, fence, until_column = _STATE_PARKED, None, None
    elif fence is None:
        state, until_column = _STATE_WAITING, None
    else:
        state, until_column = _STATE_LEASED, until
    return (
        record.task_id,
        record.task_type,
        int(record.priority),  # sqlite3 is slow to find out that it is an int
        record.envelope,
        record.enqueued_at,
        inf if record.deadline is None else record.deadline,
        record.key,
        record.attempts,
        record.thread_id,
        record.failures,
        record.total_delay,
        record.last_error,
        None if record.usage is None else _encode(record.usage),
        not_before,
        record.tenant,
        state,
        fence,
        until_column,
    )


def _enter_conversations(
    connection: sqlite3.Connection, items: Sequence[_PutItem], results: list[PutResult], talking: Sequence[int]
) -> list[PutResult]:
    """Give the records at the indexes `talking`, which were put parked, their place in their conversation."""
    stored = [index for index in talking if results[index] is PutResult.STORED]
    for index in stored:
        record, fence, until, _ = items[index]
        _settle(connection, record.thread_id)
        if fence is not None:
            connection.execute(_LEASE_ONE, (fence, until, record.task_id))
    for index in stored:
        (state,) = connection.execute(_STATE, (items[index][0].task_id,)).fetchone()
        if state != (0 if items[index][1] is None else 1):
            results[index] = PutResult.PARKED
    return results


def _settle(connection: sqlite3.Connection, thread_id: str | None) -> None:
    """Make the oldest record of a conversation waiting, unless one is leased or delayed."""
    if thread_id is not None:
        connection.execute(_DEMOTE, (thread_id,))
        connection.execute(_PROMOTE, (thread_id, thread_id))


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> list[bool]:
    """Insert `rows`, and return for each whether it was stored."""
    stored = _PUT.run(connection, rows)
    for index, row in enumerate(rows):
        if not stored[index] and connection.execute(_MAKE_WAY, (row[0], row[6], row[6])).rowcount:
            (stored[index],) = _PUT.run(connection, [row])
    return stored


def _put_one_by_one(capacity: int, connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> list[PutResult]:
    """Insert `rows` where not all may fit: whether one fits depends on the result of those before it."""
    results = []
    for row in rows:
        if capacity > 0:
            (stored,) = _insert(connection, [row])
            capacity -= stored
            results.append(PutResult.STORED if stored else PutResult.DUPLICATE)
        else:
            task_id, key = row[0], row[6]
            (taken,) = connection.execute(_TAKEN, (task_id, key, key)).fetchone()
            results.append(PutResult.DUPLICATE if taken else PutResult.FULL)
    return results


def _lease(  # noqa: PLR0913, PLR0917 - bound by position
    task_type: str,
    priorities: tuple[Priority, Priority],
    limit: int,
    shares: Mapping[str, int] | None,
    until: float,
    connection: sqlite3.Connection,
) -> Sequence[Lease]:
    given: tuple[Any, ...] = (until, new_id(), task_type, *priorities)
    if shares is None:
        return _leases(connection.execute(_LEASE, (*given, limit)).fetchall(), until)
    leases: list[Lease] = []
    for priority in range(priorities[0], priorities[1] + 1):
        for tenant, share in shares.items():
            count = min(share, limit - len(leases))
            if count > 0:
                values = (*given[:-2], priority, tenant, count)
                leases += _leases(connection.execute(_LEASE_SHARE, values).fetchall(), until)
    return leases


def _leases(rows: list[Any], until: float) -> Sequence[Lease]:
    rows.sort(key=lambda row: (row[2], row[5], row[4], row[-1]))  # RETURNING guarantees no order
    return [Lease(record=_record(row), fence=row[-2], until=until) for row in rows]


def _begin_attempt(connection: sqlite3.Connection, leases: Sequence[Lease]) -> Sequence[bool]:
    return _BEGIN_ATTEMPT.run(connection, [(lease.record.task_id, lease.fence) for lease in leases])


def _renew(leases: Sequence[Lease], until: float, connection: sqlite3.Connection) -> Sequence[Lease]:
    renewed = _RENEW.run(connection, [(lease.record.task_id, lease.fence, until) for lease in leases])
    return [lease for lease, done in zip(leases, renewed, strict=True) if not done]


def _release(leases: Sequence[Lease], connection: sqlite3.Connection) -> None:
    holders = [(lease.record.task_id, lease.fence, lease.record.attempts, *_failures(lease)) for lease in leases]
    _RELEASE.run(connection, holders)
    for lease in leases:
        _settle(connection, lease.record.thread_id)


def _failures(lease: Lease) -> tuple[int, float, str | None, bytes | None]:
    record = lease.record
    usage = None if record.usage is None else _encode(record.usage)
    return record.failures, record.total_delay, record.last_error, usage


def _record_failures(lease: Lease, connection: sqlite3.Connection) -> bool:
    values = (*_failures(lease), lease.record.task_id, lease.fence)
    return connection.execute(_RECORD_FAILURES, values).rowcount > 0


def _delay(lease: Lease, due: float, connection: sqlite3.Connection) -> bool:
    values = (due, *_failures(lease), lease.record.task_id, lease.fence)
    return connection.execute(_DELAY, values).rowcount > 0


def _wake(now: float, connection: sqlite3.Connection) -> tuple[int, tuple[int, float | None]]:
    """Wake a batch of records that are due; return how many, and how many are still delayed and when one is due."""
    due = connection.execute(_DUE, (now, _BATCH)).fetchall()
    for sequence, thread_id in due:
        connection.execute(_WAKE, (sequence,))
        _settle(connection, thread_id)
    return len(due), connection.execute(_DELAYED).fetchone()


def _finish(bound: int, connection: sqlite3.Connection, items: Sequence[_FinishItem]) -> Sequence[bool]:
    finished = _FINISH.run(connection, items)
    connection.execute(_TRIM_DONE, (bound,))
    return finished


def _reap(
    now: float, latest: float, max_attempts: int, bound: int, connection: sqlite3.Connection
) -> tuple[int, Sequence[DeadRecord]]:
    """Release a batch of expired leases; return how many there were, and the records that became DEAD."""
    rows = connection.execute(_EXPIRED, (now, _BATCH)).fetchall()
    rows += connection.execute(_TOO_LATE, (latest, _BATCH - len(rows))).fetchall()
    dead = []
    for row in rows:
        record, sequence = _record(row), row[-1]
        completion = completion_after_expiry(record, now=now, max_attempts=max_attempts)
        if completion is None:
            connection.execute(_REQUEUE_EXPIRED, (sequence,))
            _settle(connection, record.thread_id)
        else:
            connection.execute(_MARK_DEAD, (completion.finished_at, _encode(completion), sequence))
            dead.append(DeadRecord(record=record, completion=completion))
    if dead:
        connection.execute(_TRIM_DEAD, (bound,))
    return len(rows), dead


def _prune(before: float, nearly_full: Callable[[sqlite3.Connection], bool], connection: sqlite3.Connection) -> int:
    if nearly_full(connection):  # otherwise nothing could be stored until the results have had their time
        before = max(before, wall_time() - _MIN_RETENTION)
    connection.execute(_DELETE_EMPTY_DEPTHS)
    return connection.execute(_PRUNE, (before, _BATCH)).rowcount


def _mark_dead(bound: int, lease: Lease, completion: Completion, connection: sqlite3.Connection) -> bool:
    values = (completion.finished_at, _encode(completion), lease.record.task_id, lease.fence)
    marked = connection.execute(_MARK_LEASED_DEAD, values).rowcount > 0
    connection.execute(_TRIM_DEAD, (bound,))
    return marked


def _list_records(
    state: RecordState, limit: int, after: tuple[float, str] | None, connection: sqlite3.Connection
) -> Sequence[StoredRecord]:
    rows = connection.execute(_LIST[state], (*(after or (-inf, "")), max(0, limit))).fetchall()
    return [StoredRecord(record=_record(row), completion=_completion(row[-1]), until=row[-2]) for row in rows]


def _requeue(
    bound: int, check_growth: Callable[[sqlite3.Connection], None], task_id: str, connection: sqlite3.Connection
) -> PutResult | None:
    check_growth(connection)
    if connection.execute(_IS_DEAD, (task_id,)).fetchone() is None:
        return None
    if connection.execute(_DEAD_KEY_TAKEN, (task_id,)).fetchone() is not None:
        return PutResult.DUPLICATE
    (held,) = connection.execute(_HELD).fetchone()
    if held >= bound:
        return PutResult.FULL
    for (thread_id,) in connection.execute(_REQUEUE, (task_id,)).fetchall():
        _settle(connection, thread_id)
    return PutResult.STORED


def _lease_ids(task_ids: Sequence[str], until: float, connection: sqlite3.Connection) -> Sequence[Lease]:
    base, leases = new_id(), list[Lease]()
    for task_id in task_ids:
        for row in connection.execute(_LEASE_ID, (until, base, task_id)).fetchall():
            leases.append(Lease(record=_record(row), fence=row[_COLUMNS], until=until))
    return leases


def _replace(
    put: Callable[[sqlite3.Connection, Sequence[_PutItem]], Sequence[PutResult]],
    lease: Lease,
    item: _PutItem,
    connection: sqlite3.Connection,
) -> PutResult | None:
    if not connection.execute(_DELETE_LEASED, (lease.record.task_id, lease.fence)).rowcount:
        return None
    (result,) = put(connection, [item])
    return result


def _set_envelope(task_id: str, envelope: bytes, connection: sqlite3.Connection) -> bool:
    return connection.execute(_SET_ENVELOPE, (envelope, task_id)).rowcount > 0


def _delete_dead(task_id: str, connection: sqlite3.Connection) -> bool:
    return connection.execute(_DELETE_DEAD, (task_id,)).rowcount > 0


def _find(task_id: str, connection: sqlite3.Connection) -> tuple[RecordState, TaskRecord, Completion | None] | None:
    row = connection.execute(_FIND, (task_id,)).fetchone()
    if row is None:
        return None
    *_, state, completion = row
    return STATES[state], _record(row), _completion(completion)


def _completion(encoded: bytes | None) -> Completion | None:
    return None if encoded is None else _decode_completion(encoded)


def _find_key(key: str, connection: sqlite3.Connection) -> str | None:
    row = connection.execute(_FIND_KEY, (key,)).fetchone()
    return None if row is None else str(row[0])


def _depths(connection: sqlite3.Connection) -> Mapping[tuple[str, Priority, str], int]:
    rows = connection.execute(_DEPTHS).fetchall()
    return {(task_type, Priority(priority), tenant): waiting for task_type, priority, tenant, waiting in rows}


def _leased(connection: sqlite3.Connection) -> Mapping[str, int]:
    return dict(connection.execute(_LEASED).fetchall())


def _conversations(connection: sqlite3.Connection) -> Mapping[str, int]:
    found = Counter(dict(connection.execute(_PARKED).fetchall()))
    found.update(dict(connection.execute(_SCHEDULED).fetchall()))
    found.update(thread_id for (thread_id,) in connection.execute(_HEADS).fetchall())
    return found


def _record(row: Sequence[Any]) -> TaskRecord:
    task_id, task_type, priority, envelope, enqueued_at, due, key, attempts, thread_id, *further = row[:_COLUMNS]
    failures, total_delay, last_error, usage, not_before, tenant = further
    return TaskRecord(
        task_id=task_id,
        task_type=task_type,
        priority=Priority(priority),
        envelope=envelope,
        enqueued_at=enqueued_at,
        deadline=None if isinf(due) else due,
        key=key,
        attempts=attempts,
        thread_id=thread_id,
        failures=failures,
        total_delay=total_delay,
        last_error=last_error,
        usage=None if usage is None else _decode_usage(usage),
        tenant=tenant,
        not_before=not_before,
    )

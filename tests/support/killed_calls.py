"""Calls on a task store by processes that are killed as soon as the call returns.

Each process opens a store of its own, does its calls, and kills itself before anything else can run: a write that was
postponed, to a buffer, a thread or a later turn of the event loop, is lost. Then the store is opened again and asked
for its record. A missing fsync is not found: what the system has accepted survives the death of a process, and is lost
with the power only.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tests.support.leases import after_failure
from tests.support.task_stores import StoreBackend

from forebay.interfaces import Completion, Lease, RecordState, TaskRecord, TaskStore
from forebay.overflow import SqliteTaskStore, open_task_store
from forebay.overflow.sqlite_schema import SCHEMA
from forebay.storage import SqliteWriter, parse_url, sqlite_writer
from forebay.task import Priority

ROOT = Path(__file__).parents[2]
CHECKED_AT = 15.0  # when the store is opened again: leases until 10 have expired, those until 20 have not

RECORD = TaskRecord(task_id="a", task_type="t", priority=Priority.NORMAL, envelope=b"payload", enqueued_at=1.0, key="k")
ENDED = Completion(status="succeeded", result=b"result", finished_at=5.0)


async def lease(store: TaskStore, until: float) -> Lease:
    (held,) = await store.lease("t", 1, until=until)
    return held


async def put(store: TaskStore) -> None:
    await store.put(RECORD)


async def put_leased(store: TaskStore) -> None:
    await store.put(RECORD, fence="mine", until=20.0)


async def put_and_lease(store: TaskStore) -> None:
    await store.put(RECORD)
    await lease(store, until=20.0)


async def begin_attempt(store: TaskStore) -> None:
    await store.put(RECORD)
    await store.begin_attempt(await lease(store, until=20.0))


async def renew(store: TaskStore) -> None:
    await store.put(RECORD)
    held = await lease(store, until=10.0)
    store.renew([held], until=20.0)


async def release(store: TaskStore) -> None:
    await store.put(RECORD)
    await store.release([await lease(store, until=20.0)])


async def record_failures(store: TaskStore) -> None:
    await store.put(RECORD)
    await store.record_failures(after_failure(await lease(store, until=20.0)))


async def delay(store: TaskStore) -> None:
    await store.put(RECORD)
    await store.delay(after_failure(await lease(store, until=20.0)), due=30.0)


async def wake(store: TaskStore) -> None:
    await delay(store)
    await store.wake(now=30.0)


async def finish(store: TaskStore) -> None:
    await store.put(RECORD)
    held = await lease(store, until=20.0)
    await store.finish("a", ENDED, fence=held.fence)


async def mark_dead(store: TaskStore) -> None:
    await store.put(RECORD)
    await store.mark_dead(await lease(store, until=20.0), ENDED)


async def reap(store: TaskStore) -> None:
    await store.put(RECORD)
    await lease(store, until=20.0)
    await store.reap(now=21.0, max_attempts=1)


async def reap_dead(store: TaskStore) -> None:
    await begin_attempt(store)
    await store.reap(now=21.0, max_attempts=1)


async def requeue(store: TaskStore) -> None:
    await reap_dead(store)
    await store.requeue("a")


async def delete_dead(store: TaskStore) -> None:
    await mark_dead(store)
    await store.delete_dead("a")


async def prune(store: TaskStore) -> None:
    await finish(store)
    await store.prune(before=6.0)


@dataclass(frozen=True)
class KilledCall:
    """The calls of a process, of which the last is under test, and the record that they leave.

    Attributes:
        calls: makes the calls. Without the last of them the record would be another.
        state: of the record at CHECKED_AT; None: there is no record.
        attempts: of the record.
        delays: of the record, of a second each after an attempt that failed.
    """

    calls: Callable[[TaskStore], Awaitable[None]]
    state: RecordState | None
    attempts: int = 0
    delays: int = 0


KILLED_CALLS = {
    "put": KilledCall(put, RecordState.WAITING),
    "put leased": KilledCall(put_leased, RecordState.LEASED),
    "lease": KilledCall(put_and_lease, RecordState.LEASED),
    "begin_attempt": KilledCall(begin_attempt, RecordState.LEASED, attempts=1),
    "renew": KilledCall(renew, RecordState.LEASED),
    "release": KilledCall(release, RecordState.WAITING),
    "record_failures": KilledCall(record_failures, RecordState.LEASED, delays=1),
    "delay": KilledCall(delay, RecordState.DELAYED, delays=1),
    "wake": KilledCall(wake, RecordState.WAITING, delays=1),
    "finish": KilledCall(finish, RecordState.DONE),
    "mark_dead": KilledCall(mark_dead, RecordState.DEAD),
    "reap": KilledCall(reap, RecordState.WAITING),
    "reap, dead": KilledCall(reap_dead, RecordState.DEAD, attempts=1),
    "requeue": KilledCall(requeue, RecordState.WAITING),
    "delete_dead": KilledCall(delete_dead, None),
    "prune": KilledCall(prune, None),
}


# --- broken stores, which the check must reject -----------------------------------------------------------------------


class PostponingWriter(SqliteWriter):
    """A writer that answers before it commits: a transaction is committed when the next one begins."""

    def _commit(self, file: sqlite_writer._OpenFile, works: Sequence[Any]) -> Sequence[Any]:
        connection = file.connection
        with self._connection_lock:
            if connection.in_transaction:
                connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            return sqlite_writer._run_batches(connection, works)

    def run_now(self, op: Callable[[sqlite3.Connection], Any], *, writes: bool = True) -> Any:
        (value,) = self._commit(self._queue.check_open(), [(sqlite_writer._run_each, op, writes)])
        return value


class NotRenewingStore(SqliteTaskStore):
    """A store that writes no renewal."""

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:  # noqa: ARG002
        return []


def open_postponing_store(url: str) -> TaskStore:
    path = parse_url(url).path
    assert path is not None
    store = SqliteTaskStore(path)
    store._writer = PostponingWriter(path, SCHEMA)
    return store


def open_not_renewing_store(url: str) -> TaskStore:
    path = parse_url(url).path
    assert path is not None
    return NotRenewingStore(path)


OPENERS: dict[str, Callable[[str], TaskStore]] = {
    "as it is": open_task_store,
    "postponing": open_postponing_store,
    "not renewing": open_not_renewing_store,
}


# --- the check -------------------------------------------------------------------------------------------------------


def lost_calls(backend: StoreBackend, directory: Path, *, opener: str = "as it is") -> list[str]:
    """Return the names of the calls whose write is lost when their process is killed as soon as they return."""
    urls = {}
    for number, name in enumerate(KILLED_CALLS):
        own = directory / str(number)
        own.mkdir()
        urls[name] = backend.url(own)
    subprocess.run([sys.executable, "-m", __name__, opener, json.dumps(urls)], cwd=ROOT, check=True)
    return [name for name, url in urls.items() if not asyncio.run(survives(backend, url, KILLED_CALLS[name]))]


async def survives(backend: StoreBackend, url: str, call: KilledCall) -> bool:
    """Return True if the record is as `call` left it."""
    store = open_task_store(url)
    await store.open()
    await store.reap(now=CHECKED_AT, max_attempts=9)
    found, key = await store.find(RECORD.task_id), await store.find_key("k")
    await store.close()
    if found is None:
        return call.state is None and key is None
    state, record, completion = found
    kept = RECORD if state is RecordState.DEAD else backend.as_found(RECORD)
    expected = msgspec.structs.replace(
        RECORD,
        attempts=call.attempts,
        envelope=b"" if state is RecordState.DONE else kept.envelope,
        failures=call.delays,
        total_delay=call.delays,
        last_error="no" if call.delays else None,
    )
    has_ended = state in (RecordState.DONE, RecordState.DEAD)
    return (state, record, completion is not None) == (call.state, expected, has_ended)


def kill_processes(opener: str, urls: Mapping[str, str]) -> None:
    """Do each call in a forked process, which ends by killing itself."""
    for name, url in urls.items():
        store = OPENERS[opener](url)  # in the parent, which so imports its library once
        if (child := os.fork()) == 0:
            try:
                asyncio.run(call_and_die(store, KILLED_CALLS[name]))
            except BaseException:  # noqa: BLE001 - the copy of this process must not go on
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"{name} failed, see above")


async def call_and_die(store: TaskStore, call: KilledCall) -> None:
    await store.open()
    await call.calls(store)
    os.kill(os.getpid(), signal.SIGKILL)  # in the same turn of the event loop


if __name__ == "__main__":
    kill_processes(sys.argv[1], json.loads(sys.argv[2]))

"""One writer for a SQLite file: what is asked for while a commit is under way goes into the next one, together."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from forebay.errors import StoreUnavailable
from forebay.storage.sqlite_file import Schema, diagnose, open_file
from forebay.storage.url import Synchronous

_GROUP = 1_000  # operations in one transaction: more would keep the last of them, and other processes, waiting

_I = TypeVar("_I")
_T = TypeVar("_T")

_Operation: TypeAlias = Callable[[sqlite3.Connection, Sequence[Any]], Sequence[Any]]
_Work: TypeAlias = tuple[_Operation, Any, bool]  # what is to be done, with what; whether it writes
_Pending: TypeAlias = tuple[asyncio.Future[Any], _Work]  # who waits for it


class _OperationError(NamedTuple):
    """What an operation raised."""

    error: BaseException


class SqliteWriter:
    """The one writer of a SQLite file within this process, with a thread of its own and group commit.

    An operation is a plain function of the connection. It runs in a transaction that it shares with its neighbours, and
    may run twice: when one of them raises, all is undone and run again, each fenced off by a savepoint. It must begin,
    commit and remember nothing itself. Its caller gets its value after the commit.

    All that blocks goes through ``loop.run_in_executor``, but for `run_now`, which blocks its caller's thread. Other
    processes may have the same file open.

    Args:
        path: the file; it is made if it is not there, its directory is not.
        schema: what stands in it.
        synchronous: what a commit survives.
        patience: seconds to wait for another process that is writing.
    """

    def __init__(
        self, path: Path, schema: Schema, *, synchronous: Synchronous = Synchronous.FULL, busy_timeout: float = 5.0
    ) -> None:
        self._path = path
        self._schema = schema
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._connection: sqlite3.Connection | None = None
        self._connection_lock = threading.Lock()  # whoever has it uses the connection
        self._pending: deque[_Pending] = deque()
        self._flushing = False
        self._closed: asyncio.Future[None] | None = None  # there once close() was called, done once it is so

    async def open(self) -> None:
        """Open the file and bring its schema up to date. Idempotent.

        Raises:
            LedgerUnusable: it cannot be; the message says why and what to do.
        """
        if self._closed is not None and not self._closed.done():
            await asyncio.shield(self._closed)
        if self._connection is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"forebay-{self._path.name}")
        opening = self._run_in_thread(open_file, self._path, self._schema, self._synchronous, self._busy_timeout)
        try:
            self._connection = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._close_late_connection)  # a file that opens after all must not stay open
            raise
        except BaseException:
            self._executor.shutdown(wait=False)
            raise
        self._closed = None

    def _close_late_connection(self, opening: asyncio.Future[sqlite3.Connection]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._run_in_thread(opening.result().close)
        self._executor.shutdown(wait=False)  # what it was given it still does

    async def close(self) -> None:
        """Finish what was asked for, and close the file. Idempotent."""
        if self._connection is None:
            return
        if self._closed is None:
            self._closed = self._loop.create_future()
            self._schedule_flush()
        await asyncio.shield(self._closed)

    def run(self, op: Callable[[sqlite3.Connection], _T], *, writes: bool = True) -> asyncio.Future[_T]:
        """Run `op` in the next transaction; the future has its value once that is committed.

        Cancelled before its transaction has begun, the future takes its operation with it; after that it happens.

        Raises:
            LedgerUnusable: the file is not open; or, by the future, it failed and nothing was kept.
        """
        return self._submit(_run_each, op, writes=writes)

    def run_batched(
        self, op: Callable[[sqlite3.Connection, Sequence[_I]], Sequence[_T]], item: _I
    ) -> asyncio.Future[_T]:
        """Like `run`, for an operation that is cheaper for many items at once: it gets those asked for together."""
        return self._submit(op, item, writes=True)

    def run_now(self, op: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `op` in a transaction of its own, and return its value once that is committed. Blocks; from any thread.

        Raises:
            LedgerUnusable: the file is not open, or it failed and nothing was kept.
        """
        with self._connection_lock:
            if (connection := self._connection) is None or self._closed is not None:
                raise self._not_open()
            try:
                (value,) = _run_transaction(connection, [(_run_each, op, True)])
            except BaseException as error:
                raise diagnose(error, self._path) from error
        if isinstance(value, _OperationError):
            raise diagnose(value.error, self._path)
        done: _T = value
        return done

    def _not_open(self) -> StoreUnavailable:
        advice = "Use it between open() and close()."
        return StoreUnavailable(where=str(self._path), why="it is not open", advice=advice)

    def _submit(self, op: _Operation, item: Any, *, writes: bool) -> asyncio.Future[Any]:
        if self._connection is None or self._closed is not None:
            raise self._not_open()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._pending.append((future, (op, item, writes)))
        if not self._flushing:
            self._schedule_flush()
        return future

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)  # not at once: who else is awake in this turn comes along

    def _flush(self) -> None:
        pending, group = self._pending, list[_Pending]()
        while pending and not group:
            some = [pending.popleft() for _ in range(min(_GROUP, len(pending)))]
            group = [wish for wish in some if not wish[0].cancelled()]
        if self._connection is None or not (group or self._closed):
            self._flushing = False
        elif group:
            works = [work for _, work in group]
            self._run_in_thread(self._commit, self._connection, works).add_done_callback(partial(self._deliver, group))
        else:
            self._run_in_thread(self._close_connection, self._connection).add_done_callback(self._on_closed)

    def _commit(self, connection: sqlite3.Connection, works: Sequence[_Work]) -> Sequence[Any]:
        with self._connection_lock:
            return _run_transaction(connection, works)

    def _close_connection(self, connection: sqlite3.Connection) -> None:
        with self._connection_lock:
            connection.close()

    def _run_in_thread(self, work: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
        try:
            return self._loop.run_in_executor(self._executor, work, *args)
        except RuntimeError as error:  # the interpreter is shutting down and starts no more threads
            job = self._loop.create_future()
            job.set_exception(error)
            return job

    def _deliver(self, group: Sequence[_Pending], job: asyncio.Future[Sequence[Any]]) -> None:
        outcomes = _outcomes(job, len(group))
        for (future, _), outcome in zip(group, outcomes, strict=True):
            if future.done():  # its caller has gone
                continue
            if isinstance(outcome, _OperationError):
                future.set_exception(diagnose(outcome.error, self._path))
            else:
                future.set_result(outcome)
        self._loop.call_soon(self._flush)  # behind those just woken, so that what they ask for next is in it

    def _on_closed(self, closing: asyncio.Future[None]) -> None:
        self._connection = None
        self._flushing = False
        self._executor.shutdown(wait=False)
        if self._closed is None or self._closed.done():
            return
        if not closing.cancelled() and (error := closing.exception()) is not None:
            self._closed.set_exception(error)
        else:
            self._closed.set_result(None)


def _outcomes(job: asyncio.Future[Sequence[Any]], count: int) -> Sequence[Any]:
    """What each of a group gets: its value, or what it or all of them failed by."""
    if job.cancelled():
        return [_OperationError(RuntimeError("the event loop gave up the write before it was done"))] * count
    error = job.exception()
    return job.result() if error is None else [_OperationError(error)] * count


def _run_each(connection: sqlite3.Connection, ops: Sequence[Callable[[sqlite3.Connection], _T]]) -> Sequence[_T]:
    return [op(connection) for op in ops]


def _run_transaction(connection: sqlite3.Connection, works: Sequence[_Work]) -> Sequence[Any]:
    """Run them as one transaction; raise if all of it failed and nothing was kept."""
    begin = "BEGIN IMMEDIATE" if any(writes for *_, writes in works) else "BEGIN"
    connection.execute(begin)
    try:
        try:
            outcomes = _run_batches(connection, works)
        except Exception:  # noqa: BLE001 - whatever it was, it comes again below and goes to whom it concerns
            if connection.in_transaction:  # a full disk, say, has rolled it back by itself
                connection.execute("ROLLBACK")
            connection.execute(begin)
            outcomes = [_run_in_savepoint(connection, op, item) for op, item, _ in works]
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return outcomes


def _run_batches(connection: sqlite3.Connection, works: Sequence[_Work]) -> Sequence[Any]:
    """Run them by operation: nobody in a group has seen another's outcome, so between operations no order is due."""
    batches: dict[_Operation, list[Any]] = {}
    for op, item, _ in works:
        batches.setdefault(op, []).append(item)
    if len(batches) == 1:
        ((op, items),) = batches.items()
        return op(connection, items)
    values = {op: iter(op(connection, items)) for op, items in batches.items()}
    return [next(values[op]) for op, _, _ in works]


def _run_in_savepoint(connection: sqlite3.Connection, op: _Operation, item: Any) -> Any:
    connection.execute("SAVEPOINT fenced")
    try:
        (value,) = op(connection, [item])
    except Exception as error:
        if not connection.in_transaction:
            raise  # SQLite rolled back all of it: the neighbours' work is gone too
        connection.execute("ROLLBACK TO fenced")
        # A future cannot carry a StopIteration.
        value = _OperationError(RuntimeError("StopIteration") if isinstance(error, StopIteration) else error)
    connection.execute("RELEASE fenced")
    return value

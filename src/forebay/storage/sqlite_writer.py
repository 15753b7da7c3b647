"""The single writer of a SQLite file, with group commit: operations that arrive during a commit share the next one."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from forebay._threads import DaemonThreadExecutor
from forebay.clock import monotonic
from forebay.errors import StoreUnavailable
from forebay.storage.file_watch import FileWatch
from forebay.storage.sqlite_file import Schema, diagnose, has_free_pages, is_busy, open_file
from forebay.storage.url import Synchronous

_RESERVED = 512 << 10  # bytes of the disk that are kept for operations that add nothing, such as the end of a task
_MAX_GROUP = 1_000  # operations in one transaction: more would delay the last of them, and other processes

_I = TypeVar("_I")
_T = TypeVar("_T")

_Operation: TypeAlias = Callable[[sqlite3.Connection, Sequence[Any]], Sequence[Any]]
_Work: TypeAlias = tuple[_Operation, Any, bool]  # the operation, its item, whether it writes
_Pending: TypeAlias = tuple[asyncio.Future[Any], _Work]  # the caller's future, and its work


class _OperationError(NamedTuple):
    """The exception that an operation raised, in place of its value."""

    error: BaseException


class SqliteWriter:
    """The single writer of a SQLite file in this process, with a thread of its own and group commit.

    An operation is a plain function of the connection. It shares a transaction with the operations that arrived with
    it, and may run twice: if one of them raises, the transaction is rolled back and each is run again in a savepoint of
    its own. So an operation must not begin, commit or keep any state. Its caller gets the value after the commit.

    Everything that blocks goes through ``loop.run_in_executor``, except `run_now`, which blocks its caller's thread.
    Other processes may have the same file open.

    Args:
        path: the file; it is created if missing, its directory is not.
        schema: the tables of the file.
        synchronous: what a committed write survives.
        busy_timeout: seconds to wait while another process is writing.
    """

    def __init__(
        self, path: Path, schema: Schema, *, synchronous: Synchronous = Synchronous.FULL, busy_timeout: float = 5.0
    ) -> None:
        self._path = path
        self._schema = schema
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._loop: asyncio.AbstractEventLoop  # set by open()
        self._connection: sqlite3.Connection | None = None
        self._watch: FileWatch | None = None  # while the file is open
        self._process: int | None = None  # that opened it
        self._connection_lock = threading.Lock()  # held by the thread that uses the connection
        self._pending: deque[_Pending] = deque()
        self._flushing = False
        self._opening: asyncio.Future[None] | None = None  # done once the last call of open() has ended
        self._closed: asyncio.Future[None] | None = None  # set by close(), done once the file is closed

    async def open(self) -> None:
        """Open the file and bring its schema up to date. Idempotent.

        Raises:
            StoreUnavailable: the file cannot be opened; the message says why and what to do.
        """
        if self._connection is not None and self._loop.is_closed():
            self._abandon_connection(self._connection)
        while others := [each for each in (self._closed, self._opening) if each is not None and not each.done()]:
            await asyncio.wait(others)
        if self._connection is not None:
            return
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        ended = self._opening = self._loop.create_future()
        try:
            await self._open()
        finally:
            ended.set_result(None)

    async def _open(self) -> None:
        executor = self._executor = DaemonThreadExecutor(f"forebay-{self._path.name}", max_threads=1)
        opening = self._run_in_thread(self._open_file)
        try:
            self._connection, self._watch = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(partial(self._close_late_connection, executor))
            raise
        except BaseException:
            executor.shutdown(wait=False)
            raise
        self._closed = None

    def _abandon_connection(self, connection: sqlite3.Connection) -> None:
        """Close the connection of an event loop that ended before the file was closed: nobody waits for it."""
        self._connection = self._watch = self._opening = self._closed = None
        self._pending.clear()
        self._flushing = False
        with suppress(RuntimeError):  # its thread has ended already
            self._executor.submit(self._close_connection, connection)
        self._executor.shutdown(wait=False)

    def _open_file(self) -> tuple[sqlite3.Connection, FileWatch]:
        connection = open_file(self._path, self._schema, self._synchronous, self._busy_timeout)
        return connection, FileWatch(self._path)

    def check_file(self) -> None:
        """Check that the file was where it was opened after the last transaction.

        What is written to it otherwise is lost with this process.

        Raises:
            StoreUnavailable: it was removed, replaced or emptied.
        """
        if self._watch is not None and (change := self._watch.change) is not None:
            advice = "Put it back, or restart the processes that use it: they make a new one."
            raise StoreUnavailable(where=str(self._path), why=change, advice=advice)

    def nearly_full(self, connection: sqlite3.Connection) -> bool:
        """Return whether little room is left, on the disk and in the file. For operations, within their transaction."""
        watch = self._watch
        return watch is not None and watch.free_bytes < _RESERVED and not has_free_pages(connection, _RESERVED)

    def check_growth(self, connection: sqlite3.Connection) -> None:
        """Check that the file is in its place and may grow. For operations that add to it, within their transaction.

        Raises:
            StoreUnavailable: as `check_file`; or the disk is nearly full, and the rest is kept for the operations that
                make room again.
        """
        watch = self._watch
        if watch is None:
            return
        watch.look()
        self.check_file()
        if self.nearly_full(connection):
            why, advice = "the disk is nearly full", "Free some space, or move the file to a larger disk."
            raise StoreUnavailable(where=str(self._path), why=why, advice=advice)

    def _close_late_connection(
        self, executor: DaemonThreadExecutor, opening: asyncio.Future[tuple[sqlite3.Connection, FileWatch]]
    ) -> None:
        """Close a file that was opened after `open` had been cancelled; by now another `open` may have succeeded."""
        if not opening.cancelled() and opening.exception() is None:
            with suppress(RuntimeError):  # the interpreter is shutting down and starts no more threads
                self._loop.run_in_executor(executor, opening.result()[0].close)
        executor.shutdown(wait=False)  # jobs that were already submitted still run

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return self._connection is not None and self._closed is None

    async def close(self) -> None:
        """Finish the pending operations and close the file. Idempotent."""
        if self._connection is None:
            return
        if self._closed is None:
            self._closed = self._loop.create_future()
            self._schedule_flush()
        await asyncio.shield(self._closed)

    def run(self, op: Callable[[sqlite3.Connection], _T], *, writes: bool = True) -> asyncio.Future[_T]:
        """Run `op` in the next transaction; the future gets its value once that is committed.

        Cancelling the future before its transaction has begun cancels the operation; later it happens anyway.

        Raises:
            StoreUnavailable: the file is not open; or, through the future, the file failed and nothing was written.
        """
        return self._submit(_run_each, op, writes=writes)

    def run_batched(
        self, op: Callable[[sqlite3.Connection, Sequence[_I]], Sequence[_T]], item: _I
    ) -> asyncio.Future[_T]:
        """Do as `run` does, for an operation that is cheaper for many items at once: it gets all that are pending."""
        return self._submit(op, item, writes=True)

    def run_now(self, op: Callable[[sqlite3.Connection], _T], *, writes: bool = True) -> _T:
        """Run `op` in a transaction of its own and return its value after the commit. Blocks; from any thread.

        Raises:
            StoreUnavailable: the file is not open, or it failed and nothing was written.
        """
        self._check_process()
        with self._connection_lock:
            if (connection := self._connection) is None or self._closed is not None:
                raise self._not_open()
            try:
                (value,) = self._run_transaction(connection, [(_run_each, op, writes)])
            except BaseException as error:
                raise diagnose(error, self._path) from error
        if isinstance(value, _OperationError):
            raise diagnose(value.error, self._path)
        done: _T = value
        return done

    def _not_open(self) -> StoreUnavailable:
        advice = "Use it between open() and close()."
        return StoreUnavailable(where=str(self._path), why="it is not open", advice=advice)

    def _check_process(self) -> None:
        """Check that this is the process that has opened the file: a forked child has neither its thread nor its loop.

        Raises:
            StoreUnavailable: it is not.
        """
        if self._process not in (None, os.getpid()):
            why = f"it was opened in process {self._process}, and this is a child that was forked from it"
            raise StoreUnavailable(where=str(self._path), why=why, advice="Open a store of its own here.")

    def _submit(self, op: _Operation, item: Any, *, writes: bool) -> asyncio.Future[Any]:
        self._check_process()
        if self._connection is None or self._closed is not None:
            raise self._not_open()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._pending.append((future, (op, item, writes)))
        self._schedule_flush()
        return future

    def _schedule_flush(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)  # not at once: callers that run in this turn of the loop join the group

    def _flush(self) -> None:
        pending, group = self._pending, list[_Pending]()
        while pending and not group:
            some = [pending.popleft() for _ in range(min(_MAX_GROUP, len(pending)))]
            group = [each for each in some if not each[0].cancelled()]
        if self._connection is None or not (group or self._closed):
            self._flushing = False
        elif group:
            works = [work for _, work in group]
            committing = self._run_in_thread(self._commit, self._connection, works)
            committing.add_done_callback(partial(self._deliver, group))
        else:
            self._run_in_thread(self._close_connection, self._connection).add_done_callback(self._on_closed)

    def _commit(self, connection: sqlite3.Connection, works: Sequence[_Work]) -> Sequence[Any]:
        with self._connection_lock:
            return self._run_transaction(connection, works)

    def _run_transaction(self, connection: sqlite3.Connection, works: Sequence[_Work]) -> Sequence[Any]:
        give_up = monotonic() + self._busy_timeout
        try:
            while True:
                try:
                    return _run_transaction(connection, works)
                except sqlite3.OperationalError as error:
                    if not is_busy(error) or monotonic() >= give_up:
                        raise
        finally:
            self._look(connection)

    def _look(self, connection: sqlite3.Connection) -> None:
        """Look at the file and its disk, and shorten a log that takes up much of the disk while there is room for that.

        SQLite writes the log into the database once it has 4 MB. On a small disk, or a full one, that is too late:
        without room the log cannot be written there, and nothing can be written to the log.
        """
        if (watch := self._watch) is not None:
            watch.look()
            if watch.log_bytes and watch.free_bytes < 2 * watch.log_bytes + _RESERVED:
                with suppress(sqlite3.Error):  # another process reads or writes: again after the next transaction
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

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
        """Give each caller its value or its error, and start the next group."""
        outcomes = _outcomes(job, len(group))
        for (future, _), outcome in zip(group, outcomes, strict=True):
            if future.done():  # its caller was cancelled
                continue
            if isinstance(outcome, _OperationError):
                future.set_exception(diagnose(outcome.error, self._path))
            else:
                future.set_result(outcome)
        self._loop.call_soon(self._flush)  # after the callers just woken, so that their next operations join the group

    def _on_closed(self, closing: asyncio.Future[None]) -> None:
        self._connection = self._watch = None
        self._flushing = False
        self._executor.shutdown(wait=False)
        if self._closed is None or self._closed.done():
            return
        if not closing.cancelled() and (error := closing.exception()) is not None:
            self._closed.set_exception(error)
        else:
            self._closed.set_result(None)


def _outcomes(job: asyncio.Future[Sequence[Any]], count: int) -> Sequence[Any]:
    """Return the value or the error of each of the `count` operations of a group."""
    if job.cancelled():
        return [_OperationError(RuntimeError("the event loop cancelled the write before it was done"))] * count
    error = job.exception()
    return job.result() if error is None else [_OperationError(error)] * count


def _run_each(connection: sqlite3.Connection, ops: Sequence[Callable[[sqlite3.Connection], _T]]) -> Sequence[_T]:
    return [op(connection) for op in ops]


def _run_transaction(connection: sqlite3.Connection, works: Sequence[_Work]) -> Sequence[Any]:
    """Run `works` in one transaction; raise if the transaction failed and nothing was written."""
    begin = "BEGIN IMMEDIATE" if any(writes for *_, writes in works) else "BEGIN"
    connection.execute(begin)
    try:
        try:
            outcomes = _run_batches(connection, works)
        except Exception:  # noqa: BLE001 - whatever it was, it is raised again below, by the operation that caused it
            if connection.in_transaction:  # SQLite rolls some errors back itself, such as a full disk
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
    """Run `works`, one batch for each operation.

    The order between operations is free: no caller in the group has seen the outcome of another.
    """
    batches: dict[_Operation, list[Any]] = {}
    for op, item, _ in works:
        batches.setdefault(op, []).append(item)
    if len(batches) == 1:
        ((op, items),) = batches.items()
        return op(connection, items)
    values = {op: iter(op(connection, items)) for op, items in batches.items()}
    return [next(values[op]) for op, _, _ in works]


def _run_in_savepoint(connection: sqlite3.Connection, op: _Operation, item: Any) -> Any:
    connection.execute("SAVEPOINT one")
    try:
        (value,) = op(connection, [item])
    except Exception as error:
        if not connection.in_transaction:
            raise  # SQLite rolled back the whole transaction, the other operations included
        connection.execute("ROLLBACK TO one")
        # A future cannot carry a StopIteration.
        value = _OperationError(RuntimeError("StopIteration") if isinstance(error, StopIteration) else error)
    connection.execute("RELEASE one")
    return value

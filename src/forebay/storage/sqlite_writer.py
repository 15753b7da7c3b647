"""The single writer of a SQLite file, with group commit: operations that arrive during a commit share the next one."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from forebay.clock import monotonic
from forebay.errors import StoreUnavailable
from forebay.storage.file_watch import FileWatch
from forebay.storage.operation_queue import OperationError, OperationQueue
from forebay.storage.sqlite_file import Schema, diagnose, has_free_pages, is_busy, open_file
from forebay.storage.url import Fsync

_RESERVED = 512 << 10  # bytes of the disk that are kept for operations that add nothing, such as the end of a task
_MAX_GROUP = 1_000  # operations in one transaction: more would delay the last of them, and other processes

_I = TypeVar("_I")
_T = TypeVar("_T")

_Operation: TypeAlias = Callable[[sqlite3.Connection, Sequence[Any]], Sequence[Any]]
# In virtual time all writers of a file are in this process, and a watch over its commits is called: to look 50 times in
# each second that passes at once would take longer than the simulation itself.
watches_in_virtual_time: dict[Path, set[Callable[[], None]]] = {}

_Work: TypeAlias = tuple[_Operation, Any, bool]  # the operation, its item, whether it writes


class _OpenFile(NamedTuple):
    """An open file, and the watch over it."""

    connection: sqlite3.Connection
    watch: FileWatch


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
        fsync: what a committed write survives.
        busy_timeout: seconds to wait while another process is writing.
    """

    def __init__(self, path: Path, schema: Schema, *, fsync: Fsync = Fsync.YES, busy_timeout: float = 5.0) -> None:
        self._path = path
        self._schema = schema
        self._fsync = fsync
        self._busy_timeout = busy_timeout
        self._connection_lock = threading.Lock()  # held by the thread that uses the connection
        self._queue: OperationQueue[_OpenFile, _Work] = OperationQueue(
            where=str(path),
            thread_name=f"forebay-{path.name}",
            max_group=_MAX_GROUP,
            connect=self._open_file,
            run=self._commit,
            disconnect=self._close_file,
            diagnose=partial(diagnose, path=path),
        )

    async def open(self) -> None:
        """Open the file and bring its schema up to date. Idempotent.

        Raises:
            StoreUnavailable: the file cannot be opened; the message says why and what to do.
        """
        await self._queue.open()

    async def close(self) -> None:
        """Finish the pending operations and close the file. Idempotent."""
        await self._queue.close()

    def _open_file(self) -> _OpenFile:
        connection = open_file(self._path, self._schema, self._fsync, self._busy_timeout)
        return _OpenFile(connection, FileWatch(self._path))

    def _close_file(self, file: _OpenFile) -> None:
        with self._connection_lock:
            file.connection.close()

    @property
    def _watch(self) -> FileWatch | None:
        """The watch over the file while it is open."""
        return None if (file := self._queue.connection) is None else file.watch

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

    @property
    def is_open(self) -> bool:
        """True between `open` and `close`."""
        return self._queue.is_open

    def run(self, op: Callable[[sqlite3.Connection], _T], *, writes: bool = True) -> asyncio.Future[_T]:
        """Run `op` in the next transaction; the future gets its value once that is committed.

        Cancelling the future before its transaction has begun cancels the operation; later it happens anyway.

        Raises:
            StoreUnavailable: the file is not open; or, through the future, the file failed and nothing was written.
        """
        return self._queue.submit((_run_each, op, writes))

    def run_batched(
        self, op: Callable[[sqlite3.Connection, Sequence[_I]], Sequence[_T]], item: _I
    ) -> asyncio.Future[_T]:
        """Do as `run` does, for an operation that is cheaper for many items at once: it gets all that are pending."""
        return self._queue.submit((op, item, True))

    def run_now(self, op: Callable[[sqlite3.Connection], _T], *, writes: bool = True) -> _T:
        """Run `op` in a transaction of its own and return its value after the commit. Blocks; from any thread.

        Raises:
            StoreUnavailable: the file is not open, or it failed and nothing was written.
        """
        self._queue.check_open()
        with self._connection_lock:
            file = self._queue.check_open()  # again: it may have been closed meanwhile
            try:
                (value,) = self._run_transaction(file, [(_run_each, op, writes)])
            except BaseException as error:
                raise diagnose(error, self._path) from error
        if isinstance(value, OperationError):
            raise diagnose(value.error, self._path)
        done: _T = value
        return done

    def _commit(self, file: _OpenFile, works: Sequence[_Work]) -> Sequence[Any]:
        with self._connection_lock:
            return self._run_transaction(file, works)

    def _run_transaction(self, file: _OpenFile, works: Sequence[_Work]) -> Sequence[Any]:
        give_up = monotonic() + self._busy_timeout
        try:
            while True:
                try:
                    values = _run_transaction(file.connection, works)
                except sqlite3.OperationalError as error:
                    if not is_busy(error) or monotonic() >= give_up:
                        raise
                else:
                    self._tell_watches(works)
                    return values
        finally:
            self._look(file)

    def _tell_watches(self, works: Sequence[_Work]) -> None:
        if (watches := watches_in_virtual_time.get(self._path)) and any(writes for *_, writes in works):
            for look in list(watches):
                look()

    def _look(self, file: _OpenFile) -> None:
        """Look at the file and its disk, and shorten a log that takes up much of the disk while there is room for that.

        SQLite writes the log into the database once it has 4 MB. On a small disk, or a full one, that is too late:
        without room the log cannot be written there, and nothing can be written to the log.
        """
        watch = file.watch
        watch.look()
        if watch.log_bytes and watch.free_bytes < 2 * watch.log_bytes + _RESERVED:
            with suppress(sqlite3.Error):  # another process reads or writes: again after the next transaction
                file.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


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
        value = OperationError(RuntimeError("StopIteration") if isinstance(error, StopIteration) else error)
    connection.execute("RELEASE one")
    return value

"""Commit watch: notices that another process has committed to a SQLite file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.storage.sqlite_writer import SqliteWriter, watches_in_virtual_time

_INTERVAL = 0.02  # seconds between two looks

T = TypeVar("T")


class CommitWatch(Generic[T]):
    """Calls `on_commit` in the event loop when another connection has committed to a SQLite file.

    SQLite tells nobody of a commit, so a thread looks at the write-ahead log 50 times a second; that takes less than
    0.5 % of a core. Only after the log has changed does it ask SQLite whether another connection has changed it. In
    virtual time, the loop looks after each commit of this process.

    Args:
        path: the file.
        writer: the writer of the file, which is open.
        read: reads from the file what is of interest, in the transaction that looks. It must be quick.
        on_commit: called with that. The first look calls it too.
    """

    def __init__(
        self,
        path: Path,
        writer: SqliteWriter,
        read: Callable[[sqlite3.Connection], T],
        on_commit: Callable[[T], None],
    ) -> None:
        self._path = path
        self._log = f"{path}-wal"
        self._writer = writer
        self._read = read
        self._on_commit = on_commit
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = threading.Event()
        self._stamp: tuple[int, int] | None = None  # when the log was written last, and its size
        self._changed = True
        self._version: int | None = None  # changes with each commit of another connection
        self._virtual = clock.is_virtual(self._loop)
        if self._virtual:
            watches_in_virtual_time.setdefault(path, set()).add(self._arm)
            self._arm()
        else:
            threading.Thread(target=self._run, name=f"forebay-{path.name}-watch", daemon=True).start()

    def stop(self) -> None:
        """Stop looking. `on_commit` is not called any more."""
        self._stopped.set()
        if self._virtual:
            self._stop_in_virtual_time()
            if self._timer is not None:
                self._timer.cancel()

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            if self._loop.is_closed():
                return
            for value in self._look():
                try:
                    self._loop.call_soon_threadsafe(self._committed, value)
                except RuntimeError:  # the loop is closed
                    return

    def _arm(self) -> None:
        """Look soon, in virtual time."""
        if self._loop.is_closed():
            self._stop_in_virtual_time()
        elif self._timer is None:
            self._timer = self._loop.call_later(_INTERVAL, self._look_in_loop)

    def _stop_in_virtual_time(self) -> None:
        watches = watches_in_virtual_time.get(self._path, set())
        watches.discard(self._arm)
        if not watches:
            watches_in_virtual_time.pop(self._path, None)

    def _look_in_loop(self) -> None:
        self._timer = None
        self._loop.run_in_executor(None, self._look).add_done_callback(self._looked)

    def _looked(self, look: asyncio.Future[tuple[T, ...]]) -> None:
        for value in () if look.cancelled() else look.result():
            self._committed(value)

    def _look(self) -> tuple[T, ...]:
        """Return what was read if another connection has committed since the last look, else nothing."""
        try:
            log = os.stat(self._log)  # noqa: PTH116 - a Path takes three times as long
        except OSError:  # it was removed: `FileWatch` reports that
            return ()
        stamp = log.st_mtime_ns, log.st_size
        # Once more after a change: the time of the log may be that of a commit which we have seen and of one after it.
        was_changed, self._changed = self._changed, stamp != self._stamp
        self._stamp = stamp
        if not (was_changed or self._changed or self._virtual):  # virtual time is ahead of the log's
            return ()
        try:
            return self._writer.run_now(self._read_if_changed, writes=False)
        except (StoreUnavailable, sqlite3.Error):
            self._changed = True  # ask again; in virtual time, after the next commit
            return ()

    def _read_if_changed(self, connection: sqlite3.Connection) -> tuple[T, ...]:
        (version,) = connection.execute("PRAGMA data_version").fetchone()
        if version == self._version:
            return ()
        value = self._read(connection)
        self._version = version
        return (value,)

    def _committed(self, value: T) -> None:
        if not self._stopped.is_set():
            self._on_commit(value)

"""Commit watch: notices that another process has committed to a SQLite file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.storage.sqlite_writer import SqliteWriter

_INTERVAL = 0.02  # seconds between two looks


class CommitWatch:
    """Calls `notify` in the event loop when another connection has committed to a SQLite file.

    SQLite tells nobody of a commit, so a thread looks at the write-ahead log 50 times a second; that takes less than
    0.5 % of a core. Only after the log has changed does it ask SQLite whether another connection has changed it. In
    virtual time, the loop itself looks.

    Args:
        path: the file.
        writer: the writer of the file, which is open.
        notify: the callback. The first look calls it too.
    """

    def __init__(self, path: Path, writer: SqliteWriter, notify: Callable[[], None]) -> None:
        self._log = f"{path}-wal"
        self._writer = writer
        self._notify = notify
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = threading.Event()
        self._stamp: tuple[int, int] | None = None  # when the log was written last, and its size
        self._changed = True
        self._version: int | None = None  # changes with each commit of another connection
        if clock.is_virtual(self._loop):
            self._arm()
        else:
            threading.Thread(target=self._run, name=f"forebay-{path.name}-watch", daemon=True).start()

    def stop(self) -> None:
        """Stop looking. `notify` is not called any more."""
        self._stopped.set()
        if self._timer is not None:
            self._timer.cancel()

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            if self._loop.is_closed():
                return
            if self._look():
                try:
                    self._loop.call_soon_threadsafe(self._committed)
                except RuntimeError:  # the loop is closed
                    return

    def _arm(self) -> None:
        self._timer = self._loop.call_later(_INTERVAL, self._look_in_loop)

    def _look_in_loop(self) -> None:
        self._arm()
        self._loop.run_in_executor(None, self._look).add_done_callback(
            lambda look: self._committed() if not look.cancelled() and look.result() else None
        )

    def _look(self) -> bool:
        """Return whether another connection has committed since the last look."""
        try:
            log = os.stat(self._log)  # noqa: PTH116 - a Path takes three times as long
        except OSError:  # it was removed: `FileWatch` reports that
            return False
        stamp = log.st_mtime_ns, log.st_size
        # Once more after a change: the time of the log may be that of a commit which we have seen and of one after it.
        was_changed, self._changed = self._changed, stamp != self._stamp
        self._stamp = stamp
        if not (was_changed or self._changed):
            return False
        try:
            version = self._writer.run_now(_data_version, writes=False)
        except (StoreUnavailable, sqlite3.Error):
            self._changed = True  # ask again
            return False
        before, self._version = self._version, version
        return version != before

    def _committed(self) -> None:
        if not self._stopped.is_set():
            self._notify()


def _data_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA data_version").fetchone()[0])

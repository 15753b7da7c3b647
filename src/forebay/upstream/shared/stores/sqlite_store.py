"""Ledgers in a SQLite file: processes on one machine share them, and what was spent survives all of them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from forebay import clock
from forebay._fork import close_at_fork
from forebay.errors import StoreUnavailable
from forebay.storage import Fsync, Schema
from forebay.storage.file_watch import FileWatch
from forebay.storage.sqlite_file import diagnose, is_busy, open_file
from forebay.upstream.shared.ledger.ledger import AccountLedger, UnreadableLedger, decode_ledger, encode_ledger
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest

_BUSY_TIMEOUT: Final = 2.0  # seconds to wait while another process is writing: well below a lease
_FORGET_EVERY: Final = 600.0  # seconds
_FORGET_AT_ONCE: Final = 1_000  # ledgers
_FORK_PATIENCE: Final = 5.0  # seconds that a fork waits for an exchange to end: longer than one takes

_SCHEMA: Final = Schema(
    application_id=0x46424143,  # "FBAC"
    migrations=(
        (
            "CREATE TABLE ledger (key TEXT PRIMARY KEY, expires_at REAL, state BLOB NOT NULL)",
            "CREATE INDEX ledger_by_end ON ledger (expires_at) WHERE expires_at IS NOT NULL",
        ),
    ),
)
_LOAD: Final = "SELECT state FROM ledger WHERE key = ?"
_SAVE: Final = """
INSERT INTO ledger (key, expires_at, state) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET expires_at = excluded.expires_at, state = excluded.state
"""
_FORGET: Final = """
DELETE FROM ledger WHERE key IN (SELECT key FROM ledger WHERE expires_at < ? ORDER BY expires_at LIMIT ?)
"""


class _OpenFile(NamedTuple):
    """An open file, and the watch over it."""

    connection: sqlite3.Connection
    watch: FileWatch


_inherited: Final[list[_OpenFile]] = []  # of the parent of this process; SQLite forbids to use or to close them here


class SqliteLedgerStore:
    """A store of ledgers in a SQLite file. The file is opened at the first exchange, and opened again if it failed.

    Args:
        path: the file; it is created if missing, its directory is not.
        fsync: what an exchange that was answered survives, see `Fsync`.

    Attributes:
        where: see `LedgerStore`.
    """

    def __init__(self, path: Path, *, fsync: Fsync = Fsync.CHECKPOINT) -> None:
        self.where = str(path)
        self._path = path
        self._fsync = fsync
        self._file: _OpenFile | None = None
        self._forget_at = 0.0
        self._lock = threading.Lock()
        close_at_fork(self)

    def exchange(self, requests: Sequence[ExchangeRequest]) -> Sequence[ExchangeReply]:
        """See `LedgerStore`. All exchanges are one transaction."""
        with self._lock:
            try:
                if self._file is None:
                    connection = open_file(self._path, _SCHEMA, self._fsync, _BUSY_TIMEOUT)
                    self._file = _OpenFile(connection, FileWatch(self._path))
                return self._run(self._file, requests)
            except sqlite3.Error as error:
                if not (isinstance(error, sqlite3.OperationalError) and is_busy(error)):
                    self._close()
                raise diagnose(error, self._path) from error
            except UnreadableLedger as error:
                raise error.unavailable(self.where) from error
            except StoreUnavailable:
                self._close()
                raise

    def _run(self, file: _OpenFile, requests: Sequence[ExchangeRequest]) -> Sequence[ExchangeReply]:
        connection = file.connection
        self._begin(connection)
        try:
            # Its own clock, read while no other process can decide: the order of decisions is that of their times.
            now = clock.wall_time()
            replies = [_exchange(connection, now, request) for request in requests]
            if now >= self._forget_at:
                self._forget_at = now + _FORGET_EVERY
                connection.execute(_FORGET, (now, _FORGET_AT_ONCE))
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        file.watch.look()
        if (change := file.watch.change) is not None:  # the commit has gone to a file that has no name any more
            advice = "The processes that use it open the one that is there now; they know what was spent."
            raise StoreUnavailable(where=self.where, why=change, advice=advice)
        return replies

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction; wait while another process writes."""
        give_up = clock.monotonic() + _BUSY_TIMEOUT
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not is_busy(error) or clock.monotonic() >= give_up:
                    raise
            else:
                return

    def close(self) -> None:
        """See `LedgerStore`."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with suppress(sqlite3.Error):
                self._file.connection.close()
            self._file = None

    def reset_after_fork(self) -> None:
        """See `LedgerStore`."""
        self._lock = threading.Lock()
        if self._file is not None:  # an exchange did not end in time
            _inherited.append(self._file)
            self._file = None

    def close_before_fork(self) -> bool:
        """See `HoldsFile`."""
        if not self._lock.acquire(timeout=_FORK_PATIENCE):
            return False
        self._close()
        return True

    def go_on_after_fork(self) -> None:
        """See `HoldsFile`."""
        self._lock.release()


def _exchange(connection: sqlite3.Connection, now: float, request: ExchangeRequest) -> ExchangeReply:
    row = connection.execute(_LOAD, (request.ledger,)).fetchone()
    ledger = AccountLedger.open(now, request) if row is None else decode_ledger(row[0])
    reply = ledger.exchange(now, request)
    connection.execute(_SAVE, (request.ledger, ledger.expires_at(), encode_ledger(ledger)))
    return reply

"""A shard in a SQLite file, which processes on one machine share."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from forebay.clock import wall_time
from forebay.errors import StoreUnavailable
from forebay.state.entry import StoredEntry
from forebay.state.shard import ANY_VERSION, OperationRejected, Page, WriteRefused
from forebay.state.version import next_version
from forebay.storage import Fsync, Schema, SqliteWriter

_SWEPT = 100  # expired entries that a write drops at most

_SCHEMA = Schema(
    application_id=0x46425354,  # "FBST"
    migrations=(
        (
            """
            CREATE TABLE entry (
                namespace TEXT NOT NULL,
                key       BLOB NOT NULL,
                version   INTEGER NOT NULL,
                expires   REAL,             -- epoch seconds; NULL: it does not
                data      BLOB NOT NULL     -- last: a large one spills onto further pages
            )
            """,
            "CREATE UNIQUE INDEX entry_key ON entry (namespace, key)",
            "CREATE INDEX entry_expires ON entry (expires) WHERE expires IS NOT NULL",
            "CREATE TABLE last_version (version INTEGER NOT NULL)",
            "INSERT INTO last_version VALUES (0)",
        ),
    ),
)

_FIND = "SELECT rowid, version FROM entry WHERE namespace = ? AND key = ? AND (expires IS NULL OR expires > ?)"
_GET = "SELECT data, version FROM entry WHERE namespace = ? AND key = ? AND (expires IS NULL OR expires > ?)"
_PUT = """
    INSERT INTO entry (namespace, key, version, expires, data) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (namespace, key)
    DO UPDATE SET version = excluded.version, expires = excluded.expires, data = excluded.data
"""
_SCAN = """
    SELECT key, data, version FROM entry
    WHERE namespace = ? AND key {after} ? AND key {end} ? AND (expires IS NULL OR expires > ?)
    ORDER BY key {order} LIMIT ?
"""
_SCAN_UP = _SCAN.format(after=">=", end="<", order="ASC")
_SCAN_DOWN = _SCAN.format(after="<", end=">=", order="DESC")
_SWEEP = "DELETE FROM entry WHERE rowid IN (SELECT rowid FROM entry WHERE expires <= ? ORDER BY expires LIMIT ?)"


class SqliteShard:
    """A shard in a SQLite file.

    Args:
        path: the file; it is created if missing.
        url: what identifies it; by default its path.
        fsync: what an acknowledged write survives.
    """

    def __init__(self, path: Path, url: str = "", *, fsync: Fsync = Fsync.YES) -> None:
        self.url = url or f"sqlite:///{path}"
        self._writer = SqliteWriter(path, _SCHEMA, fsync=fsync)

    async def open(self) -> None:
        """Open the file."""
        await self._writer.open()

    async def close(self) -> None:
        """Finish the pending operations and close the file."""
        await self._writer.close()

    async def get(self, namespace: str, key: bytes) -> StoredEntry | None:
        """Return an entry."""
        return await self._writer.run(partial(_get, namespace, key), writes=False)

    async def put(
        self, namespace: str, key: bytes, data: bytes, ttl: float | None = None, if_version: int = ANY_VERSION
    ) -> int:
        """Write an entry."""
        return await self._writer.run(partial(self._put, namespace, key, data, ttl, if_version))

    async def delete(self, namespace: str, key: bytes, if_version: int = ANY_VERSION) -> bool:
        """Delete an entry."""
        return await self._writer.run(partial(_delete, namespace, key, if_version))

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        """Return entries by the order of their keys."""
        return await self._writer.run(partial(_scan, namespace, prefix, after, limit, reverse), writes=False)

    async def ping(self) -> None:
        """Read from the file."""
        await self._writer.run(lambda connection: connection.execute("SELECT 1").fetchone(), writes=False)

    def _put(  # noqa: PLR0913, PLR0917 - what `put` takes
        self,
        namespace: str,
        key: bytes,
        data: bytes,
        ttl: float | None,
        if_version: int,
        connection: sqlite3.Connection,
    ) -> int:
        now = wall_time()
        _sweep(connection, now)
        _check(connection, namespace, key, if_version, now)
        try:
            self._writer.check_growth(connection)
        except StoreUnavailable as error:
            raise OperationRejected(error) from error
        (last,) = connection.execute("SELECT version FROM last_version").fetchone()
        version = next_version(last, now)
        connection.execute("UPDATE last_version SET version = ?", (version,))
        connection.execute(_PUT, (namespace, key, version, None if ttl is None else now + ttl, data))
        return version


def _check(connection: sqlite3.Connection, namespace: str, key: bytes, if_version: int, now: float) -> int | None:
    """Return the row of an entry; None if there is none."""
    found = connection.execute(_FIND, (namespace, key, now)).fetchone()
    version = 0 if found is None else found[1]
    if if_version not in {ANY_VERSION, version}:
        raise WriteRefused(version)
    return None if found is None else int(found[0])


def _delete(namespace: str, key: bytes, if_version: int, connection: sqlite3.Connection) -> bool:
    row = _check(connection, namespace, key, if_version, wall_time())
    if row is None:
        return False
    connection.execute("DELETE FROM entry WHERE rowid = ?", (row,))
    return True


def _sweep(connection: sqlite3.Connection, now: float) -> None:
    connection.execute(_SWEEP, (now, _SWEPT))


def _get(namespace: str, key: bytes, connection: sqlite3.Connection) -> StoredEntry | None:
    found = connection.execute(_GET, (namespace, key, wall_time())).fetchone()
    return None if found is None else StoredEntry(key, *found)


def _scan(  # noqa: PLR0913, PLR0917 - what `scan` takes
    namespace: str,
    prefix: bytes,
    after: bytes | None,
    limit: int,
    reverse: bool,  # noqa: FBT001
    connection: sqlite3.Connection,
) -> Page:
    low, high = prefix, prefix + b"\xff"  # no key in UTF-8 has that byte
    now = wall_time()
    if reverse:
        high = high if after is None else min(high, after)
        rows = connection.execute(_SCAN_DOWN, (namespace, high, low, now, limit + 1)).fetchall()
    else:
        low = low if after is None else max(low, after + b"\0")
        rows = connection.execute(_SCAN_UP, (namespace, low, high, now, limit + 1)).fetchall()
    entries: Sequence[StoredEntry] = [StoredEntry(*row) for row in rows[:limit]]
    return Page(entries, entries[-1].key if len(rows) > limit else None)

"""A shard in a SQLite file, which processes on one machine share."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from forebay.clock import wall_time
from forebay.errors import StoreUnavailable
from forebay.state.entry import StoredEntry
from forebay.state.shard import (
    ANY_VERSION,
    TOMBSTONE_TTL,
    Copied,
    NamePage,
    OperationRejected,
    Page,
    WriteRefused,
)
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
            """
            CREATE TABLE tombstone (
                namespace TEXT NOT NULL,
                key       BLOB NOT NULL,
                version   INTEGER NOT NULL,
                expires   REAL NOT NULL,    -- epoch seconds
                PRIMARY KEY (namespace, key)
            ) WITHOUT ROWID
            """,
            "CREATE INDEX tombstone_expires ON tombstone (expires)",
            "CREATE TABLE last_version (version INTEGER NOT NULL)",
            "INSERT INTO last_version VALUES (0)",
        ),
    ),
)

_FIND = "SELECT rowid, version FROM entry WHERE namespace = ? AND key = ? AND (expires IS NULL OR expires > ?)"
_FIND_TOMBSTONE = "SELECT key, version FROM tombstone WHERE namespace = ? AND key = ? AND expires > ?"
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
_COPY = "SELECT data, version, expires FROM entry WHERE namespace = ? AND key = ? AND (expires IS NULL OR expires > ?)"
_SWEEP = "DELETE FROM entry WHERE rowid IN (SELECT rowid FROM entry WHERE expires <= ? ORDER BY expires LIMIT ?)"
_SWEEP_TOMBSTONES = """
    DELETE FROM tombstone WHERE (namespace, key) IN
    (SELECT namespace, key FROM tombstone WHERE expires <= ? ORDER BY expires LIMIT ?)
"""
_NAMES = "SELECT namespace FROM entry WHERE namespace > ? ORDER BY namespace LIMIT 1"
_NAMES_PER_PAGE = 100


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

    async def get(self, namespace: str, key: bytes, *, cached: bool = False) -> StoredEntry | None:  # noqa: ARG002
        """Return an entry."""
        return await self._writer.run(partial(_get, namespace, key), writes=False)

    async def put(  # noqa: PLR0913 - what a write is made of
        self,
        namespace: str,
        key: bytes,
        data: bytes,
        ttl: float | None = None,
        if_version: int = ANY_VERSION,
        *,
        floor: int | None = None,
    ) -> int:
        """Write an entry."""
        return await self._writer.run(partial(self._put, namespace, key, data, ttl, if_version, floor))

    async def delete(
        self, namespace: str, key: bytes, if_version: int = ANY_VERSION, *, floor: int | None = None
    ) -> bool:
        """Delete an entry."""
        return await self._writer.run(partial(_delete, namespace, key, if_version, floor))

    async def copy(self, namespace: str, key: bytes) -> Copied:
        """Return an entry with its ttl."""
        return await self._writer.run(partial(_copy, namespace, key), writes=False)

    async def restore(self, namespace: str, entry: StoredEntry, ttl: float | None) -> None:
        """Write an entry with its version."""
        await self._writer.run(partial(self._restore, namespace, entry, ttl))

    async def namespaces(self, after: str | None = None) -> NamePage:
        """Return names by their order."""
        return await self._writer.run(partial(_namespaces, after), writes=False)

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
        floor: int | None,
        connection: sqlite3.Connection,
    ) -> int:
        now = wall_time()
        _sweep(connection, now)
        _check(connection, namespace, key, if_version, now)
        version = next_version(max(_last_version(connection), floor or 0), now)
        self._write(connection, namespace, StoredEntry(key, data, version), None if ttl is None else now + ttl)
        if floor is not None and ttl is not None:
            _leave_tombstone(connection, namespace, key, version - 1, now + ttl)
        return version

    def _restore(self, namespace: str, entry: StoredEntry, ttl: float | None, connection: sqlite3.Connection) -> None:
        now = wall_time()
        _sweep(connection, now)
        for select in (_FIND, _FIND_TOMBSTONE):
            found = connection.execute(select, (namespace, entry.key, now)).fetchone()
            if found is not None and found[1] >= entry.version:
                return
        self._write(connection, namespace, entry, None if ttl is None else now + ttl)

    def _write(self, connection: sqlite3.Connection, namespace: str, entry: StoredEntry, expires: float | None) -> None:
        try:
            self._writer.check_growth(connection)
        except StoreUnavailable as error:
            raise OperationRejected(error) from error
        connection.execute("UPDATE last_version SET version = max(version, ?)", (entry.version,))
        connection.execute(_PUT, (namespace, entry.key, entry.version, expires, entry.data))


def _last_version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("SELECT version FROM last_version").fetchone()
    return int(version)


def _check(connection: sqlite3.Connection, namespace: str, key: bytes, if_version: int, now: float) -> int | None:
    """Return the row of an entry; None if there is none."""
    found = connection.execute(_FIND, (namespace, key, now)).fetchone()
    version = 0 if found is None else found[1]
    if if_version not in {ANY_VERSION, version}:
        raise WriteRefused(version)
    return None if found is None else int(found[0])


def _delete(namespace: str, key: bytes, if_version: int, floor: int | None, connection: sqlite3.Connection) -> bool:
    now = wall_time()
    row = _check(connection, namespace, key, if_version, now)
    if row is None:
        return False
    if floor is not None:
        (version,) = connection.execute("SELECT version FROM entry WHERE rowid = ?", (row,)).fetchone()
        _leave_tombstone(connection, namespace, key, version, now)
    connection.execute("DELETE FROM entry WHERE rowid = ?", (row,))
    return True


def _leave_tombstone(
    connection: sqlite3.Connection, namespace: str, key: bytes, version: int, removed_at: float
) -> None:
    """Leave a tombstone for what is removed at a time, in epoch seconds."""
    row = (namespace, key, version, removed_at + TOMBSTONE_TTL)
    connection.execute("INSERT OR REPLACE INTO tombstone (namespace, key, version, expires) VALUES (?, ?, ?, ?)", row)


def _copy(namespace: str, key: bytes, connection: sqlite3.Connection) -> Copied:
    now = wall_time()
    latest = next_version(_last_version(connection), now)
    found = connection.execute(_COPY, (namespace, key, now)).fetchone()
    if found is None:
        return Copied(None, None, latest)
    data, version, expires = found
    return Copied(StoredEntry(key, data, version), None if expires is None else expires - now, latest)


def _namespaces(after: str | None, connection: sqlite3.Connection) -> NamePage:
    names = list[str]()
    if after is None and connection.execute("SELECT 1 FROM entry WHERE namespace = '' LIMIT 1").fetchone():
        names.append("")
    last = after or ""
    for _ in range(_NAMES_PER_PAGE):  # each by the index: DISTINCT would read all of it
        found = connection.execute(_NAMES, (last,)).fetchone()
        if found is None:
            return NamePage(names, None)
        (last,) = found
        names.append(last)
    return NamePage(names, last)


def _sweep(connection: sqlite3.Connection, now: float) -> None:
    connection.execute(_SWEEP, (now, _SWEPT))
    connection.execute(_SWEEP_TOMBSTONES, (now, _SWEPT))


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

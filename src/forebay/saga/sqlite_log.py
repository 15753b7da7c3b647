"""The saga log in a SQLite file: sagas survive their process, and processes on one machine share them."""

# ruff: noqa: S608 - statements are built from constants; every value is a parameter

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from forebay._text import is_unicode
from forebay.errors import StoreUnavailable
from forebay.saga.records import (
    LONGEST_AHEAD,
    MAX_LEASE,
    REPEATABLE,
    UNFINISHED,
    LogWrite,
    SagaHeader,
    SagaState,
    StoredSaga,
)
from forebay.storage import Fsync, Schema, SqliteWriter
from forebay.storage.batch_statement import BatchStatement

_STATES = (  # by stored number: those below 2 are unfinished, those above 2 are forgotten some day
    SagaState.RUNNING,
    SagaState.COMPENSATING,
    SagaState.PARKED,
    SagaState.DONE,
    SagaState.COMPENSATED,
    SagaState.RESOLVED,
)
_NUMBERS = {state: number for number, state in enumerate(_STATES)}

_SCHEMA = Schema(
    application_id=0x46425341,  # "FBSA"
    migrations=(
        (
            """
            CREATE TABLE saga (
                sequence   INTEGER PRIMARY KEY,
                saga_id    TEXT NOT NULL UNIQUE,
                name       TEXT NOT NULL,
                version    TEXT NOT NULL,
                submission REAL NOT NULL,
                state      INTEGER NOT NULL,
                why        TEXT NOT NULL,
                created_at REAL NOT NULL,
                updated_at REAL NOT NULL,
                claims     INTEGER NOT NULL,
                entries    INTEGER NOT NULL,  -- how many it has
                holder     TEXT NOT NULL,     -- the fence; empty if nobody drives it
                until      REAL NOT NULL
            )
            """,
            # Apart, because every entry rewrites the row of its saga.
            "CREATE TABLE envelope (saga INTEGER PRIMARY KEY, data BLOB NOT NULL)",
            # In the order in which they are written: by saga, each would rewrite a page of its own.
            """
            CREATE TABLE entry (
                sequence INTEGER PRIMARY KEY, saga INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL
            )
            """,
            "CREATE UNIQUE INDEX entry_number ON entry (saga, number)",
            "CREATE INDEX saga_unfinished ON saga (name, until) WHERE state < 2",
            "CREATE INDEX saga_by_age ON saga (state, created_at, saga_id)",
            "CREATE INDEX saga_ended ON saga (updated_at) WHERE state > 2",
            """
            CREATE TRIGGER saga_forgotten AFTER DELETE ON saga
            BEGIN
                DELETE FROM entry WHERE saga = old.sequence;
                DELETE FROM envelope WHERE saga = old.sequence;
            END
            """,
        ),
    ),
)

_BEGIN = BatchStatement(
    """
    INSERT INTO saga (saga_id, name, version, submission, created_at, holder, until, updated_at, state, why, claims,
        entries)
    SELECT *, column5, 0, '', 0, 0 FROM (VALUES {rows}) AS given WHERE column1 IS NOT NULL ON CONFLICT DO NOTHING
    """,
    7,
)
_ADD_ENVELOPE = BatchStatement(
    """
    INSERT INTO envelope (saga, data)
    SELECT sequence, column2 FROM (VALUES {rows}) AS given CROSS JOIN saga ON saga_id = column1
    """,
    2,
)
_ADD_ENTRY = BatchStatement(
    """
    INSERT INTO entry (saga, number, data)
    SELECT sequence, column2, column3 FROM (VALUES {rows}) AS given CROSS JOIN saga ON saga_id = column1
    """,
    3,
)
_BEGIN_AGAIN = """
UPDATE saga SET name = ?, version = ?, submission = ?, state = 0, why = '', created_at = ?, updated_at = ?, claims = 0,
    entries = entries + 1, holder = ?, until = ?
WHERE sequence = ?
"""
_SET_ENVELOPE = "UPDATE envelope SET data = ? WHERE saga = ?"
_TAKE = "UPDATE saga SET claims = claims + 1, holder = ?, until = ?"
_SHORTEN = "UPDATE saga SET until = ? WHERE state < 2 AND name IN ({names}) AND until > ?"
_CLAIM = f"""
{_TAKE} WHERE sequence IN (
    SELECT sequence FROM saga WHERE state < 2 AND name IN ({{names}}) AND until <= ?
    ORDER BY created_at, saga_id LIMIT ?
)
RETURNING saga_id
"""
_BY_HOLDER = "FROM (VALUES {rows}) AS given WHERE saga_id = column1 AND holder = column2"
_ADVANCE = BatchStatement(
    f"""
    UPDATE saga SET updated_at = column4, claims = 0, entries = entries + column5, state = column6, why = column7,
        holder = iif(column6 < 2, holder, ''), until = iif(column6 < 2, until, 0)
    {_BY_HOLDER} AND entries = column3
    """,
    7,
)
_AMEND = """
UPDATE saga SET updated_at = ?, claims = 0, entries = entries + ?, state = ?, why = ?, holder = '', until = 0
WHERE saga_id = ? AND entries = ? AND until <= ?
"""
_RENEW = BatchStatement(f"UPDATE saga SET until = column3 {_BY_HOLDER}", 3)
_RELEASE = BatchStatement(f"UPDATE saga SET holder = '', until = 0, claims = 0 {_BY_HOLDER}", 2)
_HEADER = "saga_id, name, version, data, submission, state, why, created_at, updated_at, claims"
_FIND = f"SELECT {_HEADER}, holder, until, sequence FROM saga JOIN envelope ON saga = sequence WHERE saga_id = ?"
_ENTRIES = "SELECT data FROM entry WHERE saga = ? ORDER BY number"
_SEQUENCE = "SELECT sequence FROM saga WHERE saga_id = ?"
_STANDING = "SELECT data FROM entry WHERE saga = ? AND number >= ? AND number < ? ORDER BY number"
_LIST = f"""
SELECT {_HEADER} FROM saga JOIN envelope ON saga = sequence
WHERE state = ? AND (created_at, saga_id) > (?, ?) ORDER BY created_at, saga_id LIMIT ?
"""
_FORGET = """
DELETE FROM saga WHERE sequence IN (
    SELECT sequence FROM saga WHERE state > 2 AND updated_at < ? ORDER BY updated_at LIMIT ?
)
"""

_T = TypeVar("_T")


class _Begin(NamedTuple):
    """The arguments of `begin`."""

    header: SagaHeader
    restart: bytes
    fence: str
    until: float
    now: float


class _Append(NamedTuple):
    """The arguments of `append`."""

    saga_id: str
    write: LogWrite
    fence: str
    now: float


class SqliteSagaLog:
    """A saga log in a SQLite file, safe to share between processes on one machine.

    Args:
        path: the file; it is created if missing.
        fsync: what an acknowledged write survives, see `Fsync`.

    Attributes:
        durable: True.
    """

    durable = True

    def __init__(self, path: Path, *, fsync: Fsync = Fsync.YES) -> None:
        self._writer = SqliteWriter(path, _SCHEMA, fsync=fsync)
        self._begin = partial(_begin, self._writer.check_growth)

    async def open(self) -> None:
        """Open the file."""
        await self._writer.open()

    async def close(self) -> None:
        """Finish the pending operations and close the file."""
        await self._writer.close()

    async def begin(self, header: SagaHeader, restart: bytes, *, fence: str, until: float, now: float) -> StoredSaga:
        """Begin a saga, or take it. Cancelled, release it if it was taken after all."""
        beginning = self._writer.run_batched(self._begin, _Begin(header, restart, fence, until, now))
        stored = await self._hold(beginning, lambda stored: [(stored.header.saga_id, fence)])
        self._writer.check_file()
        return stored

    async def claim(
        self, names: Sequence[str], *, limit: int, fence: str, until: float, now: float
    ) -> Sequence[StoredSaga]:
        """Take unfinished sagas. Cancelled, release those that were taken after all."""
        claiming = self._writer.run(partial(_claim, names, max(0, limit), fence, until, now))
        claimed = await self._hold(claiming, lambda claimed: [(each.header.saga_id, fence) for each in claimed])
        self._writer.check_file()
        return claimed

    async def _hold(self, taking: asyncio.Future[_T], holders: Callable[[_T], Iterable[tuple[str, str]]]) -> _T:
        """Return what is being taken; if cancelled, release it once it is taken: these are its holders."""
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(partial(self._release_late, holders))
            raise

    def _release_late(self, holders: Callable[[_T], Iterable[tuple[str, str]]], taking: asyncio.Future[_T]) -> None:
        if taking.cancelled() or taking.exception() is not None:
            return
        with suppress(StoreUnavailable):  # closed in the meantime: the leases expire
            for holder in holders(taking.result()):
                self._writer.run_batched(_release, holder)

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        """Write entries, with one fsync for all that are written at the time."""
        written = await self._writer.run_batched(_append, _Append(saga_id, write, fence, now))
        self._writer.check_file()
        return written

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        """Extend leases, and return the ids of those that are lost."""
        lost = await self._writer.run(partial(_renew, holders, until))
        self._writer.check_file()  # or a saga would go on trying to write to a file that nobody else has
        return lost

    async def release(self, saga_id: str, *, fence: str) -> None:
        """End a lease."""
        await self._writer.run_batched(_release, (saga_id, fence))

    async def amend(self, saga_id: str, write: LogWrite, *, now: float) -> bool:
        """Write what a person decides."""
        if not is_unicode(saga_id):  # as in `get`
            return False
        written = await self._writer.run(partial(_amend, saga_id, write, now))
        self._writer.check_file()
        return written

    async def get(self, saga_id: str) -> StoredSaga | None:
        """Return a saga, or None."""
        # What is not valid Unicode was never stored, and SQLite cannot be asked for it.
        return await self._writer.run(partial(_find, saga_id), writes=False) if is_unicode(saga_id) else None

    async def list(
        self, *, states: Sequence[SagaState], limit: int, after: tuple[float, str] | None = None
    ) -> Sequence[SagaHeader]:
        """Return a page of the sagas in these states."""
        return await self._writer.run(partial(_list, set(states), max(0, limit), after), writes=False)

    async def forget(self, *, before: float, limit: int) -> int:
        """Drop sagas that ended before `before`, the oldest first."""
        return await self._writer.run(partial(_forget, before, max(0, limit)))


def _begin(
    check_growth: Callable[[sqlite3.Connection], None], connection: sqlite3.Connection, items: Sequence[_Begin]
) -> Sequence[StoredSaga]:
    begun = _BEGIN.run(connection, [_row(each) for each in items])
    new = [each.header for each, is_new in zip(items, begun, strict=True) if is_new]
    if new:
        check_growth(connection)
        _ADD_ENVELOPE.run(connection, [(header.saga_id, header.envelope) for header in new])
    return [
        _new(item) if is_new else _take(check_growth, connection, item)
        for item, is_new in zip(items, begun, strict=True)
    ]


def _row(item: _Begin) -> tuple[Any, ...]:
    header = item.header
    return header.saga_id, header.name, header.version, header.submission, item.now, item.fence, item.until


def _new(item: _Begin) -> StoredSaga:
    header = msgspec.structs.replace(item.header, created_at=item.now, updated_at=item.now)
    return StoredSaga(header=header, holder=item.fence, until=item.until)


def _take(
    check_growth: Callable[[sqlite3.Connection], None], connection: sqlite3.Connection, item: _Begin
) -> StoredSaga:
    """Begin a saga again, take it, or leave it, by its state; and return it as it is then."""
    header, restart, fence, until, now = item
    row = connection.execute(_FIND, (header.saga_id,)).fetchone()
    stored, sequence = _stored(connection, row), row[-1]
    if stored.header.state in REPEATABLE:
        check_growth(connection)
        values = (header.name, header.version, header.submission, now, now, fence, until, sequence)
        connection.execute(_BEGIN_AGAIN, values)
        connection.execute(_SET_ENVELOPE, (header.envelope, sequence))
        _ADD_ENTRY.run(connection, [(header.saga_id, len(stored.entries), restart)])
    elif stored.header.state in UNFINISHED and stored.until <= now:
        connection.execute(f"{_TAKE} WHERE sequence = ?", (fence, until, sequence))
    else:
        return stored
    return _stored(connection, connection.execute(_FIND, (header.saga_id,)).fetchone())


def _claim(  # noqa: PLR0913, PLR0917 - what `claim` takes
    names: Sequence[str], limit: int, fence: str, until: float, now: float, connection: sqlite3.Connection
) -> Sequence[StoredSaga]:
    marks = ", ".join("?" * len(names))
    connection.execute(_SHORTEN.format(names=marks), (now + MAX_LEASE, *names, now + LONGEST_AHEAD))
    rows = connection.execute(_CLAIM.format(names=marks), (fence, until, *names, now, limit)).fetchall()
    claimed = [_stored(connection, connection.execute(_FIND, row).fetchone()) for row in rows]
    return sorted(claimed, key=lambda stored: _age(stored.header))  # RETURNING guarantees no order


def _append(connection: sqlite3.Connection, items: Sequence[_Append]) -> Sequence[bool]:
    written = [False] * len(items)
    for wave in _waves(items):
        write = [index for index in wave if items[index].write.entries]
        for index, done in zip(
            write, _ADVANCE.run(connection, [_advance(items[index]) for index in write]), strict=True
        ):
            written[index] = done
        _add_entries(connection, [items[index] for index in write if written[index]])
        for index in wave:
            written[index] = written[index] or _stands(connection, items[index])
    return written


def _waves(items: Sequence[_Append]) -> Sequence[Sequence[int]]:
    """Return the indexes of `items` in groups to be written one after the other, each with one item of a saga."""
    waves, counts = list[list[int]](), defaultdict[str, int](int)
    for index, item in enumerate(items):
        if (wave := counts[item.saga_id]) == len(waves):
            waves.append([])
        waves[wave].append(index)
        counts[item.saga_id] += 1
    return waves


def _advance(item: _Append) -> tuple[Any, ...]:
    write = item.write
    return item.saga_id, item.fence, write.number, item.now, len(write.entries), _NUMBERS[write.state], write.why


def _add_entries(connection: sqlite3.Connection, items: Sequence[_Append]) -> None:
    numbered = [(item.saga_id, enumerate(item.write.entries, item.write.number)) for item in items]
    _ADD_ENTRY.run(connection, [(saga_id, *entry) for saga_id, entries in numbered for entry in entries])


def _stands(connection: sqlite3.Connection, item: _Append) -> bool:
    """Return whether the entries of an item stand in the log already."""
    write, known = item.write, connection.execute(_SEQUENCE, (item.saga_id,)).fetchone()
    if known is None:
        return False
    rows = connection.execute(_STANDING, (*known, write.number, write.number + len(write.entries))).fetchall()
    return [data for (data,) in rows] == list(write.entries)


def _renew(holders: Mapping[str, str], until: float, connection: sqlite3.Connection) -> Sequence[str]:
    renewed = _RENEW.run(connection, [(saga_id, fence, until) for saga_id, fence in holders.items()])
    return [saga_id for saga_id, done in zip(holders, renewed, strict=True) if not done]


def _release(connection: sqlite3.Connection, holders: Sequence[tuple[str, str]]) -> Sequence[None]:
    _RELEASE.run(connection, holders)
    return [None] * len(holders)


def _amend(saga_id: str, write: LogWrite, now: float, connection: sqlite3.Connection) -> bool:
    values = (now, len(write.entries), _NUMBERS[write.state], write.why, saga_id, write.number, now)
    if not connection.execute(_AMEND, values).rowcount:
        return False
    _add_entries(connection, [_Append(saga_id, write, "", now)])
    return True


def _find(saga_id: str, connection: sqlite3.Connection) -> StoredSaga | None:
    row = connection.execute(_FIND, (saga_id,)).fetchone()
    return None if row is None else _stored(connection, row)


def _stored(connection: sqlite3.Connection, row: Sequence[Any]) -> StoredSaga:
    *header, holder, until, sequence = row
    entries = [data for (data,) in connection.execute(_ENTRIES, (sequence,)).fetchall()]
    return StoredSaga(header=_header(header), entries=entries, holder=holder, until=until)


def _header(row: Sequence[Any]) -> SagaHeader:
    saga_id, name, version, envelope, submission, state, why, created_at, updated_at, claims = row
    return SagaHeader(
        saga_id=saga_id,
        name=name,
        version=version,
        envelope=envelope,
        submission=submission,
        state=_STATES[state],
        why=why,
        created_at=created_at,
        updated_at=updated_at,
        claims=claims,
    )


def _list(
    states: Iterable[SagaState], limit: int, after: tuple[float, str] | None, connection: sqlite3.Connection
) -> Sequence[SagaHeader]:
    page, age = list[SagaHeader](), after or (-inf, "")
    for state in states:  # each by the index: with all in one statement, SQLite would sort all sagas
        rows = connection.execute(_LIST, (_NUMBERS[state], *age, limit)).fetchall()
        page += [_header(row) for row in rows]
    return sorted(page, key=_age)[:limit]


def _age(header: SagaHeader) -> tuple[float, str]:
    return header.created_at, header.saga_id


def _forget(before: float, limit: int, connection: sqlite3.Connection) -> int:
    return connection.execute(_FORGET, (before, limit)).rowcount

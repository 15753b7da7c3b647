"""The SQLite file of a spend log."""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from forebay.clock import monotonic
from forebay.errors import StoreUnavailable
from forebay.quota.budget import period_start
from forebay.spend_log.spend_record import AlertPlace, GivenAlert, hour_of
from forebay.spend_log.spent_totals import SpentTotals, places_of
from forebay.spend_log.unwritten_spend import SpendBatch
from forebay.storage import Fsync, Schema
from forebay.storage.file_watch import FileWatch
from forebay.storage.sqlite_file import diagnose, is_busy, open_file

T = TypeVar("T")

_DAY: Final = 86_400
_BUSY_TIMEOUT: Final = 5.0  # seconds to wait while another process is writing
_HOURS_KEPT: Final = 62 * _DAY  # seconds: older spend is by day
_TASKS_KEPT: Final = 30 * _DAY  # seconds after which the spend of a single task is forgotten
_MAX_TASKS: Final = 131_072  # whose spend is kept, the latest

_SCHEMA: Final = Schema(
    application_id=0x46425350,  # "FBSP"
    migrations=(
        (
            """
            CREATE TABLE spend (
                hour          INTEGER NOT NULL,
                upstream      TEXT NOT NULL,
                tenant        TEXT NOT NULL,
                model         TEXT NOT NULL,
                key           TEXT NOT NULL,
                calls         INTEGER NOT NULL,
                input_tokens  INTEGER NOT NULL,
                output_tokens INTEGER NOT NULL,
                usd           REAL NOT NULL,
                PRIMARY KEY (hour, upstream, tenant, model, key)
            ) WITHOUT ROWID
            """,
            """
            CREATE TABLE task (
                upstream TEXT NOT NULL,
                task_id  TEXT NOT NULL,
                hour     INTEGER NOT NULL,
                usd      REAL NOT NULL,
                PRIMARY KEY (upstream, task_id, hour)
            ) WITHOUT ROWID
            """,
            "CREATE INDEX task_by_age ON task (hour)",
            """
            CREATE TABLE alert (
                upstream TEXT NOT NULL,
                budget   TEXT NOT NULL,
                subject  TEXT NOT NULL,
                period   REAL NOT NULL,
                share    REAL NOT NULL,
                PRIMARY KEY (upstream, budget, subject)
            ) WITHOUT ROWID
            """,
        ),
        (  # `key` was also the API key where no key was issued: which of them a row had is not known
            """
            CREATE TABLE spend_by_keys (
                hour          INTEGER NOT NULL,
                upstream      TEXT NOT NULL,
                tenant        TEXT NOT NULL,
                model         TEXT NOT NULL,
                key           TEXT NOT NULL,
                api_key       TEXT NOT NULL,
                calls         INTEGER NOT NULL,
                input_tokens  INTEGER NOT NULL,
                output_tokens INTEGER NOT NULL,
                usd           REAL NOT NULL,
                PRIMARY KEY (hour, upstream, tenant, model, key, api_key)
            ) WITHOUT ROWID
            """,
            """
            INSERT INTO spend_by_keys
            SELECT hour, upstream, tenant, model, key, '', calls, input_tokens, output_tokens, usd FROM spend
            """,
            "DROP TABLE spend",
            "ALTER TABLE spend_by_keys RENAME TO spend",
        ),
    ),
)

_ADD: Final = """
INSERT INTO spend (hour, upstream, tenant, model, key, api_key, calls, input_tokens, output_tokens, usd)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET calls = calls + excluded.calls, input_tokens = input_tokens + excluded.input_tokens,
    output_tokens = output_tokens + excluded.output_tokens, usd = usd + excluded.usd
"""
_ADD_TASK: Final = """
INSERT INTO task (hour, upstream, task_id, usd) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET usd = usd + excluded.usd
"""
_ADD_ALERT: Final = """
INSERT INTO alert (upstream, budget, subject, period, share) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET period = excluded.period, share = excluded.share
    WHERE (excluded.period, excluded.share) > (period, share)
"""
_OF_MONTH: Final = "SELECT hour, upstream, tenant, key, sum(usd) FROM spend WHERE hour >= ? GROUP BY 1, 2, 3, 4"
_EARLIER: Final = "SELECT upstream, tenant, key, sum(usd) FROM spend WHERE hour < ? GROUP BY 1, 2, 3"
_TASKS: Final = "SELECT hour, upstream, task_id, usd FROM task ORDER BY hour DESC LIMIT ?"
_ALERTS: Final = "SELECT upstream, budget, subject, period, share FROM alert"
_BY_DAY: Final = (
    """
    INSERT INTO spend (hour, upstream, tenant, model, key, api_key, calls, input_tokens, output_tokens, usd)
    SELECT hour - hour % 86400, upstream, tenant, model, key, api_key, sum(calls), sum(input_tokens),
        sum(output_tokens), sum(usd)
    FROM spend WHERE hour < :old AND hour % 86400 != 0 GROUP BY 1, 2, 3, 4, 5, 6
    ON CONFLICT DO UPDATE SET calls = calls + excluded.calls, input_tokens = input_tokens + excluded.input_tokens,
        output_tokens = output_tokens + excluded.output_tokens, usd = usd + excluded.usd
    """,
    "DELETE FROM spend WHERE hour < :old AND hour % 86400 != 0",
)
_FORGET: Final = (
    "DELETE FROM task WHERE hour < :task",
    "DELETE FROM task WHERE hour < (SELECT hour FROM task ORDER BY hour DESC LIMIT 1 OFFSET :tasks)",
    "DELETE FROM alert WHERE period > 0 AND period < :old",
    """
    DELETE FROM alert WHERE budget = 'task_budget'
        AND NOT EXISTS (SELECT 1 FROM task WHERE task.upstream = alert.upstream AND task_id = subject)
    """,
)


class SpendFile:
    """The SQLite file of a spend log, open for one writer. Its methods block, and are called by one thread at a time.

    Args:
        path: the file; it is created if it is missing, its directory is not.
        fsync: what a committed write survives.

    Raises:
        StoreUnavailable: it cannot be opened; the message says why and what to do.
    """

    def __init__(self, path: Path, fsync: Fsync) -> None:
        self.path = path
        self._connection = open_file(path, _SCHEMA, fsync, _BUSY_TIMEOUT)
        self._watch = FileWatch(path)
        weakref.finalize(self, self._connection.close).atexit = False  # of an upstream that nobody has any more

    def write(self, batch: SpendBatch) -> None:
        """Add a batch to what the file has, all of it or, if this raises, nothing.

        Raises:
            StoreUnavailable: the file cannot be written.
        """

        def add(connection: sqlite3.Connection) -> None:
            rows = batch.rows.items()
            connection.executemany(
                _ADD,
                [
                    (row.hour, *map(_text, row[1:]), each.calls, each.input_tokens, each.output_tokens, each.usd)
                    for row, each in rows
                ],
            )
            tasks = batch.tasks.items()
            connection.executemany(_ADD_TASK, [(hour, *map(_text, names), usd) for (hour, *names), usd in tasks])
            connection.executemany(_ADD_ALERT, [(*map(_text, place), *given) for place, given in batch.alerts.items()])

        self._transact("BEGIN IMMEDIATE", add)

    def find_change(self) -> str | None:
        """Return what has happened to the file since it was opened, such as its removal; None if it is in place."""
        self._watch.look()
        return self._watch.change

    def load(self, now: float) -> tuple[SpentTotals, dict[AlertPlace, GivenAlert]]:
        """Return what budgets begin with, and the alerts that were given.

        Args:
            now: epoch seconds.

        Raises:
            StoreUnavailable: the file cannot be read.
        """
        return self._transact("BEGIN", lambda connection: _load(connection, now))

    def tidy(self, now: float) -> None:
        """Add up spend that is long past by day, and forget single tasks and alerts that are.

        Args:
            now: epoch seconds.

        Raises:
            StoreUnavailable: the file cannot be written.
        """
        old = int(now - _HOURS_KEPT) // _DAY * _DAY
        values = {"old": old, "task": now - _TASKS_KEPT, "tasks": _MAX_TASKS}

        def tidy(connection: sqlite3.Connection) -> None:
            for statement in (*_BY_DAY, *_FORGET):
                connection.execute(statement, values)

        self._transact("BEGIN IMMEDIATE", tidy)

    def select(self, statement: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Return what a statement selects.

        Raises:
            StoreUnavailable: the file cannot be read.
        """
        return self._transact("BEGIN", lambda connection: connection.execute(statement, values).fetchall())

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def _transact(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `work` returns, in a transaction, once it is committed."""
        give_up = monotonic() + _BUSY_TIMEOUT
        connection = self._connection
        try:
            _begin(connection, begin, give_up)
            value = work(connection)
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise diagnose(error, self.path) from error
        return value


def _begin(connection: sqlite3.Connection, begin: str, give_up: float) -> None:
    """Begin a transaction; while another process is writing, try again until `give_up`, in monotonic seconds."""
    while True:
        try:
            connection.execute(begin)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or monotonic() >= give_up:
                raise
        else:
            return


def _load(connection: sqlite3.Connection, now: float) -> tuple[SpentTotals, dict[AlertPlace, GivenAlert]]:
    totals = SpentTotals()
    month = int(period_start("month", now))
    for *labels, usd in connection.execute(_EARLIER, (month,)):
        for place in places_of(*labels):
            totals.add_earlier(place, usd)
    present = hour_of(now)  # of later hours the clock was wrong: what was spent then is spent now, as budgets have it
    for hour, *labels, usd in connection.execute(_OF_MONTH, (month,)):
        for place in places_of(*labels):
            totals.add(place, min(hour, present), usd)
    tasks = connection.execute(_TASKS, (_MAX_TASKS,)).fetchall()
    for hour, upstream, task_id, usd in reversed(tasks):
        totals.add((upstream, "task_budget", task_id), min(hour, present), usd)
    rows = connection.execute(_ALERTS)
    return totals, {AlertPlace(*names): GivenAlert(period, share) for *names, period, share in rows}


def _text(text: str) -> str:
    """Return a text that SQLite can store: without surrogates, which a name in a request may have."""
    return text.encode(errors="backslashreplace").decode()


def open_existing(path: Path) -> SpendFile:
    """Return the open file of a spend log that exists.

    Raises:
        StoreUnavailable: there is none, or it is not a spend log.
    """
    if not path.is_file():
        advice = "Give the file that `forebay gateway --check` names, or the spend_log of the upstream."
        raise StoreUnavailable(where=str(path), why="there is no such file", advice=advice)
    if not path.stat().st_size:
        raise StoreUnavailable(where=str(path), why="it is empty", advice="Name a spend log.")
    return SpendFile(path, Fsync.YES)

"""What only the ledger in SQLite has: a plan for every statement, and virtual time."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay import clock
from forebay.interfaces import PutResult, TaskRecord
from forebay.overflow import SqliteTaskStore
from forebay.overflow import sqlite as statements
from forebay.overflow.sqlite_schema import SCHEMA
from forebay.simulation import simulate
from forebay.storage.batch_statement import BatchStatement
from forebay.storage.sqlite_file import open_file
from forebay.storage.url import Synchronous
from forebay.task import Priority


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_file(tmp_path / "ledger.db", SCHEMA, Synchronous.OFF, 1.0)
    yield connection
    connection.close()


def sql() -> dict[str, str]:
    """Every statement of the room, those of many rows with one and with many."""
    found: dict[str, str] = {}
    for name, value in vars(statements).items():
        if isinstance(value, BatchStatement):
            found |= {f"{name} of {size}": statement for size, statement in value._statements.items()}
        elif isinstance(value, str) and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)", value):
            found[name] = value
    return found


# What goes through a whole table or index, and why that is no matter.
SHORT = {
    "_DEPTHS": "as many rows as types and priorities",
    "_FORGET_TYPES": "as many rows as types and priorities",
    "_OLDEST_DONE": "a part of _TRIM_DONE, and not run by itself",
    "_OLDEST_DEAD": "a part of _TRIM_DEAD, and not run by itself",
    "_TRIM_DONE": "in order, and only as far as it drops",
    "_TRIM_DEAD": "in order, and only as far as it drops",
}


@pytest.mark.parametrize("name", sql())
def test_no_statement_looks_through_the_table(connection: sqlite3.Connection, name: str) -> None:
    statement = sql()[name]
    plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?")).fetchall()
    steps = [step for *_, step in plan]
    scans = [step for step in steps if step.startswith("SCAN") and not re.search(r"VALUES|CONSTANT|given", step)]
    assert not [step for step in steps if "TEMP B-TREE" in step]
    assert bool(scans) is (name in SHORT), steps


@pytest.mark.blocks  # the virtual loop runs in line what would run in a thread
def test_it_works_in_virtual_time(tmp_path: Path) -> None:
    async def main() -> list[str]:
        ledger = SqliteTaskStore(tmp_path / "ledger.db", synchronous=Synchronous.OFF)
        await ledger.open()
        for name in "ab":
            now = clock.wall_time()
            row = TaskRecord(task_id=name, task_type="t", priority=Priority.NORMAL, envelope=b"", enqueued_at=now)
            assert await ledger.put(row) is PutResult.STORED
        leases = await ledger.lease("t", 2, until=clock.wall_time() + 30)
        await ledger.close()
        return [lease.record.task_id for lease in leases]

    assert simulate(main, seed=1) == ["a", "b"]


async def test_what_was_acknowledged_is_committed(tmp_path: Path) -> None:
    ledger = SqliteTaskStore(tmp_path / "ledger.db", synchronous=Synchronous.OFF)
    await ledger.open()
    for number in range(3):
        row = TaskRecord(task_id=f"{number}", task_type="t", priority=Priority.LOW, envelope=b"", enqueued_at=0.0)
        assert await ledger.put(row) is PutResult.STORED
        other = sqlite3.connect(tmp_path / "ledger.db")
        assert other.execute("SELECT count(*) FROM task").fetchone() == (number + 1,)
        other.close()
    await ledger.close()

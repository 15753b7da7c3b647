"""The task store in SQLite: every statement uses an index; it works in virtual time; acknowledged means committed."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from forebay import clock
from forebay.interfaces import Completion, PutResult, TaskRecord
from forebay.overflow import SqliteTaskStore
from forebay.overflow import sqlite as statements
from forebay.overflow.sqlite_schema import SCHEMA
from forebay.simulation import simulate
from forebay.storage.batch_statement import BatchStatement
from forebay.storage.sqlite_file import Schema, open_file
from forebay.storage.url import Fsync
from forebay.task import Priority


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_file(tmp_path / "store.db", SCHEMA, Fsync.NO, 1.0)
    yield connection
    connection.close()


def sql() -> dict[str, str]:
    """Return every statement of the module, those for many rows with one row and with many."""
    found: dict[str, str] = {}
    for name, value in vars(statements).items():
        if isinstance(value, BatchStatement):
            found |= {f"{name} of {size}": statement for size, statement in value._statements.items()}
        elif isinstance(value, str) and re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)", value):
            found[name] = value
    return found | {f"_LIST of {state.value}": statement for state, statement in statements._LIST.items()}


# The statements that scan a whole table or index, and why that is acceptable.
SCANS = {
    "_ANY_WAITING": "as many rows as types, priorities and tenants with tasks that have waited lately",
    "_DEPTHS": "as many rows as types, priorities and tenants with tasks that wait",
    "_DELETE_EMPTY_DEPTHS": "as many rows as types, priorities and tenants with tasks that have waited lately",
    "_LEASED": "an index of the records that run, for an autoscaler",
    "_PARKED": "an index alone, once in a third of a lease",
    **dict.fromkeys((f"_LIST of {state}" for state in ("waiting", "parked", "leased", "delayed")), "for a person"),
    "_DELAYED": "an index alone, once in a third of a lease and where a retry is due",
    "_OLDEST_DONE": "a part of _TRIM_DONE, and not run by itself",
    "_OLDEST_DEAD": "a part of _TRIM_DEAD, and not run by itself",
    "_TRIM_DONE": "in order, and only as far as it deletes",
    "_TRIM_DEAD": "in order, and only as far as it deletes",
}

# The statements that sort rows, and why that is acceptable.
SORTS = {
    "_LEASED": "as many rows as records run, for an autoscaler",
    "_LEASE": "a supervisor says how many of each tenant it leases",
    **dict.fromkeys(
        (f"_LIST of {state}" for state in ("waiting", "parked", "leased", "delayed", "done")), "for a person"
    ),
}


@pytest.mark.parametrize("name", sql())
def test_no_statement_scans_the_table(connection: sqlite3.Connection, name: str) -> None:
    statement = sql()[name]
    plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?")).fetchall()
    steps = [step for *_, step in plan]
    scans = [step for step in steps if step.startswith("SCAN") and not re.search(r"VALUES|CONSTANT|given", step)]
    assert any("TEMP B-TREE" in step for step in steps) is (name in SORTS), steps
    assert bool(scans) is (name in SCANS), steps


@pytest.mark.blocks  # it opens the file itself
async def test_a_file_of_the_second_schema_is_migrated_and_its_failed_tasks_lose_their_keys(tmp_path: Path) -> None:
    old = open_file(tmp_path / "store.db", Schema(SCHEMA.application_id, SCHEMA.migrations[:2]), Fsync.NO, 1.0)
    succeeded, failed = (
        msgspec.msgpack.encode(Completion(status=status, finished_at=5.0, result=b"result"))
        for status in ("succeeded", "failed")
    )
    for task_id, state, completion in (
        ("waits", 0, None),
        ("leased", 1, None),
        ("parked", -1, None),
        ("succeeded", 2, succeeded),
        ("failed", 2, failed),
        ("dead", 3, failed),
    ):
        old.execute(
            "INSERT INTO task (task_id, task_type, state, priority, due, key, attempts, enqueued_at, fence, until,"
            " finished_at, completion, envelope, thread_id)"
            " VALUES (?, 't', ?, 2, 1e999, ?, 0, 5.0, iif(?2 = 1, 'f', NULL), 9.0, 5.0, ?, x'',"
            " iif(?2 IN (-1, 1), 'c', NULL))",
            (task_id, state, f"key of {task_id}", completion),
        )
    old.close()
    store = SqliteTaskStore(tmp_path / "store.db", fsync=Fsync.NO)
    await store.open()
    keys = {}
    for name in ("waits", "leased", "parked", "succeeded", "failed", "dead"):
        found = await store.find(name)
        assert found is not None
        assert (found[1].failures, found[1].total_delay, found[1].last_error) == (0, 0.0, None)
        keys[name] = (found[1].key, await store.find_key(f"key of {name}"))
    assert keys.pop("failed") == (None, None)
    assert keys.pop("dead") == ("key of dead", None)
    assert keys == {name: (f"key of {name}", name) for name in keys}
    await store.close()


@pytest.mark.blocks  # it opens the file itself
async def test_a_file_of_the_first_schema_is_migrated_with_its_records(tmp_path: Path) -> None:
    old = open_file(tmp_path / "store.db", Schema(SCHEMA.application_id, SCHEMA.migrations[:1]), Fsync.NO, 1.0)
    old.execute(
        "INSERT INTO task (task_id, task_type, state, priority, due, attempts, enqueued_at, envelope)"
        " VALUES ('old', 't', 0, 2, 1e999, 0, 5.0, x'')"
    )
    old.execute("INSERT INTO depth VALUES ('t', 2, 1)")
    old.execute("UPDATE size SET tasks = 1 WHERE kind = 0")
    old.close()
    store = SqliteTaskStore(tmp_path / "store.db", fsync=Fsync.NO)
    await store.open()
    for number in range(2):
        record = TaskRecord(
            task_id=f"{number}",
            task_type="t",
            priority=Priority.NORMAL,
            envelope=b"",
            enqueued_at=9.0,
            thread_id="conversation",
        )
        await store.put(record)
    assert await store.depths() == {("t", Priority.NORMAL, "default"): 2}
    leases = await store.lease("t", 9, until=1.0, shares={"default": 9})
    assert [lease.record.task_id for lease in leases] == ["old", "0"]
    assert await store.depths() == {}
    await store.close()


@pytest.mark.blocks  # a virtual loop runs inline what would run in a thread
def test_it_works_in_virtual_time(tmp_path: Path) -> None:
    async def main() -> list[str]:
        store = SqliteTaskStore(tmp_path / "store.db", fsync=Fsync.NO)
        await store.open()
        for name in "ab":
            now = clock.wall_time()
            record = TaskRecord(task_id=name, task_type="t", priority=Priority.NORMAL, envelope=b"", enqueued_at=now)
            assert await store.put(record) is PutResult.STORED
        leases = await store.lease("t", 2, until=clock.wall_time() + 30)
        await store.close()
        return [lease.record.task_id for lease in leases]

    assert simulate(main, seed=1) == ["a", "b"]


async def test_on_a_disk_that_is_nearly_full_results_are_kept_for_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteTaskStore(tmp_path / "store.db", fsync=Fsync.NO)
    await store.open()
    now = clock.wall_time()
    for task_id, age in (("old", 700.0), ("new", 500.0)):
        record = TaskRecord(task_id=task_id, task_type="t", priority=Priority.LOW, envelope=b"", enqueued_at=now)
        await store.put(record)
        await store.finish(task_id, Completion(status="succeeded", finished_at=now - age), fence=None)
    assert await store.prune(before=now - 86_400.0) == 0
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
    await store.find("new")  # a transaction, after which the disk is looked at
    assert await store.prune(before=now - 86_400.0) == 1
    assert await store.find("new") is not None
    await store.close()


async def test_an_acknowledged_write_is_committed(tmp_path: Path) -> None:
    store = SqliteTaskStore(tmp_path / "store.db", fsync=Fsync.NO)
    await store.open()
    for number in range(3):
        record = TaskRecord(task_id=f"{number}", task_type="t", priority=Priority.LOW, envelope=b"", enqueued_at=0.0)
        assert await store.put(record) is PutResult.STORED
        other = sqlite3.connect(tmp_path / "store.db")
        assert other.execute("SELECT count(*) FROM task").fetchone() == (number + 1,)
        other.close()
    await store.close()

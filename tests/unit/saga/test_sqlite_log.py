"""The saga log in SQLite: few statements, one fsync for many, and what is acknowledged is in the file."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from forebay.errors import StoreUnavailable
from forebay.saga import SagaState
from forebay.saga import sqlite_log as statements
from forebay.saga.records import LogWrite, SagaHeader, StoredSaga
from forebay.saga.sqlite_log import SqliteSagaLog
from forebay.storage import Fsync
from forebay.storage.batch_statement import BatchStatement
from forebay.storage.sqlite_file import open_file

RUNNING, COMPENSATED = SagaState.RUNNING, SagaState.COMPENSATED


def header(saga_id: str) -> SagaHeader:
    return SagaHeader(saga_id=saga_id, name="publish", version="1", envelope=b"envelope", submission=1.5)


async def begin(log: SqliteSagaLog, saga_id: str, *, until: float = 10.0, now: float = 0.0) -> StoredSaga:
    return await log.begin(header(saga_id), b"restart", fence="mine", until=until, now=now)


async def append(log: SqliteSagaLog, saga_id: str, number: int = 0, state: SagaState = RUNNING) -> bool:
    return await log.append(saga_id, LogWrite(number, [b"entry"], state), fence="mine", now=1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saga.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SqliteSagaLog]:
    log = SqliteSagaLog(path, fsync=Fsync.NO)
    await log.open()
    yield log
    await log.close()


@pytest.fixture
async def executed(log: SqliteSagaLog) -> list[str]:
    """Return the statements that SQLite executes, in a list that grows."""
    found: list[str] = []
    await log._writer.run(lambda connection: connection.set_trace_callback(found.append))
    found.clear()
    return found


# --- statements ------------------------------------------------------------------------------------------------------


async def test_sagas_that_begin_together_take_two_statements_and_one_commit(
    log: SqliteSagaLog, executed: list[str]
) -> None:
    await asyncio.gather(*(begin(log, f"{number}") for number in range(200)))
    assert [statement.split()[0] for statement in executed].count("INSERT") == 2
    assert executed.count("COMMIT") == 1
    assert len(executed) < 10


async def test_entries_of_different_sagas_take_two_statements_and_one_commit(
    log: SqliteSagaLog, executed: list[str]
) -> None:
    await asyncio.gather(*(begin(log, f"{number}") for number in range(200)))
    executed.clear()
    assert all(await asyncio.gather(*(append(log, f"{number}") for number in range(200))))
    assert [statement.split()[0] for statement in executed if "INTO" in statement or "UPDATE" in statement] == [
        "UPDATE",
        "INSERT",
    ]
    assert executed.count("COMMIT") == 1
    assert len(executed) < 10


async def test_entries_of_one_saga_do_not_split_the_statements_of_the_others(
    log: SqliteSagaLog, executed: list[str]
) -> None:
    await asyncio.gather(*(begin(log, f"{number}") for number in range(200)))
    executed.clear()
    steps = [(f"{saga}", number) for saga in range(200) for number in range(3)]
    assert all(await asyncio.gather(*(append(log, *step) for step in steps)))
    assert sum(statement.lstrip().startswith("UPDATE") for statement in executed) == 3


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    connection = open_file(tmp_path / "plan.db", statements._SCHEMA, Fsync.NO, 1.0)
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
    take = found.pop("_TAKE")  # a part of two others
    for name in ("_CLAIM", "_SHORTEN"):
        found[name] = found[name].format(names="?, ?")
    return found | {"_TAKE": f"{take} WHERE sequence = ?"}


SORTED = {"_CLAIM": "only the sagas whose lease has expired"}


@pytest.mark.parametrize("name", sql())
def test_no_statement_scans_a_table(connection: sqlite3.Connection, name: str) -> None:
    statement = sql()[name]
    plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?")).fetchall()
    steps = [step for *_, step in plan]
    assert not [step for step in steps if step.startswith("SCAN") and not re.search(r"VALUES|CONSTANT|given", step)]
    assert any("TEMP B-TREE" in step for step in steps) is (name in SORTED), steps


# --- durability ------------------------------------------------------------------------------------------------------


@pytest.mark.blocks  # it reads the file itself
async def test_an_acknowledged_entry_is_committed(log: SqliteSagaLog, path: Path) -> None:
    reader = sqlite3.connect(path)
    await begin(log, "a")
    assert reader.execute("SELECT saga_id, holder, entries FROM saga").fetchall() == [("a", "mine", 0)]
    for number in range(3):
        assert await append(log, "a", number)
        assert reader.execute("SELECT count(*) FROM entry").fetchone() == (number + 1,)
    await log.append("a", LogWrite(3, [b"entry"], COMPENSATED), fence="mine", now=1.0)
    assert reader.execute("SELECT state, holder, entries FROM saga").fetchall() == [(4, "", 4)]
    reader.close()


@pytest.mark.parametrize(("fsync", "expected"), [(Fsync.YES, 2), (Fsync.CHECKPOINT, 1), (Fsync.NO, 0)])
async def test_a_commit_is_synced_as_the_url_says(path: Path, fsync: Fsync, expected: int) -> None:
    log = SqliteSagaLog(path, fsync=fsync)
    await log.open()
    found = await log._writer.run(lambda connection: connection.execute("PRAGMA synchronous").fetchone())
    assert found == (expected,)
    await log.close()


@pytest.mark.blocks
async def test_nothing_is_acknowledged_once_the_file_was_removed(log: SqliteSagaLog, path: Path) -> None:
    await begin(log, "a")
    await begin(log, "expired", until=0.0)
    path.unlink()  # noqa: ASYNC240 - a local file
    with pytest.raises(StoreUnavailable, match="removed"):
        await append(log, "a")
    with pytest.raises(StoreUnavailable, match="removed"):
        await begin(log, "b")
    with pytest.raises(StoreUnavailable, match="removed"):
        await begin(log, "expired")
    with pytest.raises(StoreUnavailable, match="removed"):
        await log.claim(["publish"], limit=1, fence="mine", until=30.0, now=20.0)
    with pytest.raises(StoreUnavailable, match="removed"):
        await log.amend("a", LogWrite(1, [b"note"], SagaState.RESOLVED), now=99.0)
    with pytest.raises(StoreUnavailable, match="removed"):
        await log.renew({"a": "mine"}, until=30.0)


async def test_on_a_disk_that_is_nearly_full_no_saga_begins_and_those_that_have_begun_go_on(
    log: SqliteSagaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("running", "expired", "compensated"):
        await begin(log, name, until=0.0 if name == "expired" else 10.0)
    assert await append(log, "compensated", state=COMPENSATED)
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=1))
    begun = await asyncio.gather(
        *(begin(log, name) for name in ("new", "running", "compensated", "expired")), return_exceptions=True
    )
    assert [isinstance(each, StoreUnavailable) for each in begun] == [True, False, True, False]
    assert "nearly full" in str(begun[0])
    assert await append(log, "running")
    assert await append(log, "expired")
    assert await log.get("new") is None
    monkeypatch.undo()
    assert (await begin(log, "new")).holder == (await begin(log, "compensated")).holder == "mine"


async def test_what_is_forgotten_leaves_nothing_in_the_file(log: SqliteSagaLog) -> None:
    for number in range(5):
        await begin(log, f"{number}")
        assert await append(log, f"{number}", state=COMPENSATED)
    assert await log.forget(before=100.0, limit=10) == 5
    counts = "SELECT (SELECT count(*) FROM saga), (SELECT count(*) FROM entry), (SELECT count(*) FROM envelope)"
    assert await log._writer.run(lambda connection: connection.execute(counts).fetchone()) == (0, 0, 0)

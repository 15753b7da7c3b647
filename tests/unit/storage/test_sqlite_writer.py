"""The single writer of a SQLite file: operations commit in groups, and none in a group affects another."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.errors import StoreUnavailable
from forebay.storage import Fsync, Schema, SqliteWriter, sqlite_writer

SCHEMA = Schema(application_id=1, migrations=(("CREATE TABLE number (n INTEGER PRIMARY KEY)",),))
INSERT = "INSERT INTO number VALUES (?)"


def add(number: int, connection: sqlite3.Connection) -> int:
    connection.execute(INSERT, (number,))
    return number


def numbers(connection: sqlite3.Connection) -> list[int]:
    return [number for (number,) in connection.execute("SELECT n FROM number ORDER BY n")]


class OperationFailed(Exception):
    """An error that an operation of these tests raises."""


def fail(connection: sqlite3.Connection) -> None:
    connection.execute(INSERT, (666,))
    raise OperationFailed


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[SqliteWriter]:
    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA, fsync=Fsync.NO, busy_timeout=0.05)
    await writer.open()
    yield writer
    await writer.close()


@pytest.fixture
async def statements(writer: SqliteWriter) -> list[str]:
    """Return the statements that SQLite executes, in a list that grows."""
    executed: list[str] = []
    await writer.run(lambda connection: connection.set_trace_callback(executed.append))
    executed.clear()
    return executed


class BlockedOperation:
    """Blocks the writer's thread inside an operation until it is opened."""

    def __init__(self, writer: SqliteWriter) -> None:
        self._entered = asyncio.Event()
        self._proceed = threading.Event()
        self._loop = asyncio.get_running_loop()
        self.done = writer.run(self._pass)

    def _pass(self, _: sqlite3.Connection) -> None:
        self._loop.call_soon_threadsafe(self._entered.set)
        self._proceed.wait(10)

    async def reached(self) -> None:
        await self._entered.wait()

    def open(self) -> None:
        self._proceed.set()


# --- groups ----------------------------------------------------------------------------------------------------------


async def test_operations_submitted_together_are_committed_once(writer: SqliteWriter, statements: list[str]) -> None:
    values = await asyncio.gather(*(writer.run(partial(add, number)) for number in range(100)))
    assert values == list(range(100))
    assert statements.count("COMMIT") == 1


async def test_operations_submitted_during_a_commit_share_the_next(writer: SqliteWriter, statements: list[str]) -> None:
    blocked = BlockedOperation(writer)
    await blocked.reached()
    later = []
    for number in range(100):
        later.append(asyncio.ensure_future(writer.run(partial(add, number))))
        await asyncio.sleep(0)
    blocked.open()
    await asyncio.gather(blocked.done, *later)
    assert statements.count("COMMIT") == 2


async def test_callers_woken_by_a_commit_share_the_next(writer: SqliteWriter, statements: list[str]) -> None:
    async def three(first: int) -> None:
        for number in range(first, first + 3):
            await writer.run(partial(add, number))

    await asyncio.gather(*(three(first) for first in range(0, 300, 3)))
    assert statements.count("COMMIT") == 3


async def test_a_group_is_bounded(writer: SqliteWriter, statements: list[str]) -> None:
    await asyncio.gather(*(writer.run(partial(add, number)) for number in range(sqlite_writer._MAX_GROUP + 1)))
    assert statements.count("COMMIT") == 2


async def test_reading_takes_no_write_lock(writer: SqliteWriter, statements: list[str]) -> None:
    await writer.run(numbers, writes=False)
    assert statements[0] == "BEGIN"
    await asyncio.gather(writer.run(numbers, writes=False), writer.run(partial(add, 1)))
    assert "BEGIN IMMEDIATE" in statements


async def test_a_batched_operation_gets_the_items_submitted_together(writer: SqliteWriter) -> None:
    batches = []

    def double(_: sqlite3.Connection, items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        return [2 * item for item in items]

    asked: list[asyncio.Future[int]] = []
    for number in range(5):
        asked += [writer.run_batched(double, number), writer.run(partial(add, number))]
    assert await asyncio.gather(*asked) == [0, 0, 2, 1, 4, 2, 6, 3, 8, 4]
    assert batches == [[0, 1, 2, 3, 4]]


# --- failures --------------------------------------------------------------------------------------------------------


async def test_a_failed_operation_does_not_undo_the_others_of_its_group(writer: SqliteWriter) -> None:
    one, failed, two = await asyncio.gather(
        writer.run(partial(add, 1)), writer.run(fail), writer.run(partial(add, 2)), return_exceptions=True
    )
    assert (one, two) == (1, 2)
    assert isinstance(failed, OperationFailed)
    assert await writer.run(numbers) == [1, 2]


async def test_a_violated_constraint_is_raised_to_the_caller_that_violated_it(writer: SqliteWriter) -> None:
    outcomes = await asyncio.gather(*(writer.run(partial(add, n)) for n in (1, 2, 1, 3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, int, sqlite3.IntegrityError, int]
    assert await writer.run(numbers) == [1, 2, 3]


async def test_a_failed_item_does_not_undo_the_rest_of_its_batch(writer: SqliteWriter) -> None:
    def insert(connection: sqlite3.Connection, items: Sequence[int]) -> Sequence[int]:
        return [add(item, connection) for item in items]

    outcomes = await asyncio.gather(*(writer.run_batched(insert, n) for n in (1, 1, 2)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, sqlite3.IntegrityError, int]


async def test_a_stop_iteration_which_no_future_can_carry_is_still_raised(writer: SqliteWriter) -> None:
    def stop(_: sqlite3.Connection) -> None:
        raise StopIteration

    stopped, one = await asyncio.gather(writer.run(stop), writer.run(partial(add, 1)), return_exceptions=True)
    assert isinstance(stopped, RuntimeError)
    assert one == 1


async def test_a_full_disk_writes_nothing_and_says_so(writer: SqliteWriter) -> None:
    def fill(connection: sqlite3.Connection) -> None:
        for number in range(10_000):
            connection.execute(INSERT, (number,))

    (pages,) = await writer.run(lambda connection: connection.execute("PRAGMA page_count").fetchone())
    await writer.run(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    outcomes = await asyncio.gather(writer.run(partial(add, -1)), writer.run(fill), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, StoreUnavailable)
        assert "disk is full" in str(outcome)
    assert await writer.run(numbers) == []
    assert await writer.run(partial(add, 1)) == 1


async def test_a_wait_for_another_process_is_bounded_and_explained(writer: SqliteWriter, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "numbers.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="another process"):
        await writer.run(partial(add, 1))
    assert await writer.run(numbers, writes=False) == []  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    assert await writer.run(partial(add, 1)) == 1


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_an_operation_cancelled_before_its_transaction_does_not_happen(writer: SqliteWriter) -> None:
    one, two = writer.run(partial(add, 1)), writer.run(partial(add, 2))
    one.cancel()
    assert await two == 2
    assert await writer.run(numbers) == [2]


async def test_an_operation_cancelled_during_its_transaction_happens_with_its_group(writer: SqliteWriter) -> None:
    blocked = BlockedOperation(writer)
    waiter = asyncio.ensure_future(asyncio.wait([writer.run(partial(add, 1)), other := writer.run(partial(add, 2))]))
    await blocked.reached()
    blocked.done.cancel()
    blocked.open()
    await waiter
    assert other.result() == 2
    assert await writer.run(numbers) == [1, 2]


async def test_the_writer_goes_on_after_all_operations_are_cancelled(writer: SqliteWriter) -> None:
    for future in [writer.run(partial(add, number)) for number in range(5)]:
        future.cancel()
    assert await writer.run(numbers) == []


async def test_an_operation_behind_a_whole_group_of_cancelled_ones_runs(writer: SqliteWriter) -> None:
    left = [writer.run(partial(add, number)) for number in range(sqlite_writer._MAX_GROUP + 1)]
    for future in left:
        future.cancel()
    await writer.run(partial(add, -1))
    assert await writer.run(numbers) == [-1]


# --- run_now, from any thread ----------------------------------------------------------------------------------------


@pytest.mark.blocks
async def test_run_now_does_not_wait_for_a_blocked_event_loop(writer: SqliteWriter) -> None:
    queued = writer.run(partial(add, 1))
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(writer.run_now, partial(add, 2)).result(timeout=10) == 2
    assert not queued.done()
    await queued
    assert await writer.run(numbers) == [1, 2]


async def test_two_threads_never_use_the_connection_at_once(writer: SqliteWriter) -> None:
    blocked = BlockedOperation(writer)
    await blocked.reached()
    with ThreadPoolExecutor(1) as thread:
        adding = thread.submit(writer.run_now, partial(add, 1))
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.05)
        blocked.open()
        assert adding.result(timeout=10) == 1
    await blocked.done


async def test_a_failure_in_run_now_raises_and_writes_nothing(writer: SqliteWriter) -> None:
    with pytest.raises(OperationFailed):
        await asyncio.get_running_loop().run_in_executor(None, writer.run_now, fail)
    assert await writer.run(numbers) == []


async def test_run_now_raises_once_the_writer_is_closed(writer: SqliteWriter) -> None:
    await writer.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        writer.run_now(numbers)


# --- opening and closing ---------------------------------------------------------------------------------------------


async def test_close_finishes_the_pending_operations(writer: SqliteWriter, tmp_path: Path) -> None:
    asked = [writer.run(partial(add, number)) for number in range(sqlite_writer._MAX_GROUP * 2)]
    await writer.close()
    assert all(future.done() for future in asked)
    other = sqlite3.connect(tmp_path / "numbers.db")
    assert len(numbers(other)) == sqlite_writer._MAX_GROUP * 2
    other.close()


async def test_a_cancelled_close_still_closes(writer: SqliteWriter, tmp_path: Path) -> None:
    blocked = BlockedOperation(writer)
    await blocked.reached()
    closing = asyncio.ensure_future(writer.close())
    await asyncio.sleep(0)
    closing.cancel()
    blocked.open()
    await writer.close()
    assert not (tmp_path / "numbers.db-wal").exists()  # the last connection to close checkpoints the log


async def test_open_during_close_leaves_it_open(writer: SqliteWriter) -> None:
    blocked = BlockedOperation(writer)
    await blocked.reached()
    closing = asyncio.ensure_future(writer.close())
    opening = asyncio.ensure_future(writer.open())
    await asyncio.sleep(0)
    blocked.open()
    await asyncio.gather(closing, opening)
    assert await writer.run(partial(add, 1)) == 1


async def test_a_cancelled_open_leaves_no_connection_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    entered, closed, proceed = asyncio.Event(), asyncio.Event(), threading.Event()

    class Opened:
        def close(self) -> None:
            loop.call_soon_threadsafe(closed.set)

    def slow(*_: object) -> Opened:
        loop.call_soon_threadsafe(entered.set)
        proceed.wait(10)
        return Opened()

    monkeypatch.setattr(sqlite_writer, "open_file", slow)
    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA)
    opening = asyncio.ensure_future(writer.open())
    await entered.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    proceed.set()
    async with asyncio.timeout(10):
        await closed.wait()
    with pytest.raises(StoreUnavailable):
        writer.run(numbers)


async def test_a_writer_opened_again_outlives_a_cancelled_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    entered, closed, proceed = asyncio.Event(), asyncio.Event(), threading.Event()

    class Opened:
        def close(self) -> None:
            loop.call_soon_threadsafe(closed.set)

    def slow(*_: object) -> Opened:
        loop.call_soon_threadsafe(entered.set)
        proceed.wait(10)
        return Opened()

    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_writer, "open_file", slow)
        opening = asyncio.ensure_future(writer.open())
        await entered.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await writer.open()
    proceed.set()
    async with asyncio.timeout(10):
        await closed.wait()
    assert await writer.run(partial(add, 1)) == 1
    await writer.close()


async def test_open_works_after_a_failed_open(tmp_path: Path) -> None:
    writer = SqliteWriter(tmp_path / "missing" / "numbers.db", SCHEMA)
    with pytest.raises(StoreUnavailable, match="mkdir"):
        await writer.open()
    await writer.close()
    (tmp_path / "missing").mkdir()
    await writer.open()
    assert await writer.run(partial(add, 1)) == 1
    await writer.close()


async def test_many_opens_at_once_are_one(tmp_path: Path) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA, fsync=Fsync.NO)
    await asyncio.gather(*(writer.open() for _ in range(8)))
    await writer.run(partial(add, 1))
    assert sum(thread.ident not in before and "numbers.db" in thread.name for thread in threading.enumerate()) == 1
    await writer.close()
    await asyncio.gather(writer.open(), writer.open())
    assert await writer.run(numbers, writes=False) == [1]
    await writer.close()


# --- other processes, and small disks --------------------------------------------------------------------------------


async def test_a_writer_asks_for_its_turn_every_few_milliseconds(tmp_path: Path) -> None:
    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA, fsync=Fsync.NO, busy_timeout=0.3)
    await writer.open()
    attempts: list[str] = []
    await writer.run(lambda connection: connection.set_trace_callback(attempts.append))
    attempts.clear()
    other = sqlite3.connect(tmp_path / "numbers.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="another process"):
        await writer.run(partial(add, 1))
    other.close()
    assert attempts.count("BEGIN IMMEDIATE") >= 10
    await writer.run(partial(add, 1))
    await writer.close()


class SmallDisk:
    """A disk with room for `size` bytes of the files of a database, which says so to everybody who asks."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.size = size

    def free(self) -> int:
        return max(0, self.size - sum(path.stat().st_size for path in self.directory.iterdir()))

    def statvfs(self, _: object) -> Any:
        return SimpleNamespace(f_bavail=self.free(), f_frsize=1)


async def test_the_log_is_shortened_before_it_fills_a_small_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SmallDisk(tmp_path, 2 << 20)
    monkeypatch.setattr("os.statvfs", disk.statvfs)
    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA, fsync=Fsync.NO)
    await writer.open()
    for number in range(400):
        await writer.run(partial(add, number))
        assert disk.free() > 512 << 10
    await writer.close()


async def test_what_makes_a_file_grow_is_refused_while_the_disk_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SqliteWriter(tmp_path / "numbers.db", SCHEMA, fsync=Fsync.NO)
    await writer.open()
    disk = SmallDisk(tmp_path, 0)
    monkeypatch.setattr("os.statvfs", disk.statvfs)
    with pytest.raises(StoreUnavailable, match="nearly full"):
        await writer.run(writer.check_growth)
    assert await writer.run(partial(add, 1)) == 1
    disk.size = 1 << 30
    await writer.run(writer.check_growth)
    await writer.close()


def test_a_disk_that_never_answers_does_not_keep_the_interpreter_from_exiting(tmp_path: Path) -> None:
    program = f"""
import asyncio, threading
from pathlib import Path
from forebay.storage import Schema, SqliteWriter

async def main():
    writer = SqliteWriter(Path({str(tmp_path / "numbers.db")!r}), Schema(application_id=1, migrations=()))
    await writer.open()
    began = threading.Event()
    writer.run(lambda connection: (began.set(), threading.Event().wait()))
    await asyncio.sleep(0)
    await asyncio.get_running_loop().run_in_executor(None, began.wait)

asyncio.run(main())
print("at the end", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "at the end\n"

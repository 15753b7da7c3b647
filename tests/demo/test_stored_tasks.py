"""Spilled tasks are counted in their store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from demo.stored_tasks import StoredTasks, _count_records, count_stored_tasks
from forebay.interfaces import Completion, TaskRecord
from forebay.overflow import open_task_store
from forebay.task import Priority


def row(name: str) -> TaskRecord:
    return TaskRecord(task_id=name, task_type="brief", priority=Priority.NORMAL, envelope=b"x", enqueued_at=0.0)


async def test_each_row_is_counted_as_what_it_is(tmp_path: Path) -> None:
    store = open_task_store(f"sqlite:///{tmp_path}/spill.db")
    await store.open()
    for name in "abc":
        await store.put(row(name))
    for name in "defg":
        await store.put(row(name), fence=name, until=1e12)
    for name, status in zip("efg", ("succeeded", "failed", "timed_out"), strict=True):
        assert await store.finish(name, Completion(status=status, finished_at=1.0), fence=name)
    await store.close()
    counted = await asyncio.to_thread(count_stored_tasks, tmp_path / "spill.db")  # noqa: TID251 - as the demo does
    assert counted == StoredTasks(waiting=3, leased=1, done=1, failed=2)
    assert (counted.to_do, counted.total) == (4, 7)


def test_where_there_is_no_ledger_nothing_is_kept(tmp_path: Path) -> None:
    assert count_stored_tasks(tmp_path / "none.db").total == 0
    assert list(tmp_path.iterdir()) == []


async def test_the_records_of_any_store_are_counted(tmp_path: Path) -> None:
    store = open_task_store(f"sqlite:///{tmp_path}/spill.db")
    await store.open()
    for name in "abc":
        await store.put(row(name))
    await store.put(msgspec.structs.replace(row("h"), not_before=1e12))
    for name in "defg":
        await store.put(row(name), fence=name, until=1e12)
    for name, status in zip("efg", ("succeeded", "failed", "timed_out"), strict=True):
        assert await store.finish(name, Completion(status=status, finished_at=1.0), fence=name)
    await store.close()
    counted = await _count_records(store)
    assert counted == StoredTasks(waiting=4, leased=1, done=1, failed=2)
    assert await asyncio.to_thread(count_stored_tasks, tmp_path / "spill.db") == counted  # noqa: TID251 - as the demo does

"""Counts of the spilled tasks, read from their store rather than from the supervisor that wrote it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from forebay.interfaces import Completion, RecordState, StoredRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.storage import parse_url
from forebay.task import TaskStatus

_COUNT: Final = "SELECT state, COUNT(*) FROM task WHERE state < 2 GROUP BY state"
_ENDED: Final = "SELECT completion FROM task WHERE state >= 2"
_BUSY: Final = 5.0  # seconds to wait for a writer
_PAGE: Final = 1000  # records read at a time

_completion = msgspec.msgpack.Decoder(Completion)


class StoredTasks(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of tasks in a task store, by state."""

    waiting: int = 0
    leased: int = 0
    done: int = 0
    failed: int = 0

    @property
    def to_do(self) -> int:
        """Tasks that are not done yet."""
        return self.waiting + self.leased

    @property
    def total(self) -> int:
        """All tasks in the store."""
        return self.waiting + self.leased + self.done + self.failed


def count_overflow(url: str) -> StoredTasks:
    """Count the tasks in the overflow that a URL names; zero of each if it is a file that does not exist.

    Raises:
        InvalidOverflowUrl: the URL names no store.
        StoreUnavailable: the store cannot be asked.
        sqlite3.Error: see `count_stored_tasks`.
    """
    path = parse_url(url).path
    return asyncio.run(_count_records(open_task_store(url))) if path is None else count_stored_tasks(path)


async def _count_records(store: TaskStore) -> StoredTasks:
    await store.open()
    try:
        states = {state: [each async for each in _records(store, state)] for state in RecordState}
    finally:
        await store.close()
    ended = [*states[RecordState.DONE], *states[RecordState.DEAD]]
    done = sum(each.completion is not None and each.completion.status == TaskStatus.SUCCEEDED.value for each in ended)
    return StoredTasks(
        waiting=sum(len(states[state]) for state in (RecordState.WAITING, RecordState.PARKED, RecordState.DELAYED)),
        leased=len(states[RecordState.LEASED]),
        done=done,
        failed=len(ended) - done,
    )


async def _records(store: TaskStore, state: RecordState) -> AsyncIterator[StoredRecord]:
    last = None
    while page := await store.list_records(state, _PAGE, after=last):
        for each in page:
            yield each
        last = page[-1].position


def count_stored_tasks(path: Path) -> StoredTasks:
    """Count the tasks in a SQLite file; zero of each if the file does not exist.

    Raises:
        sqlite3.Error: the file is not a task store, or it was busy for longer than five seconds.
    """
    if not path.exists():
        return StoredTasks()
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY)) as connection:
        states = dict(connection.execute(_COUNT).fetchall())
        endings = [_completion.decode(blob).status for (blob,) in connection.execute(_ENDED)]
    done = endings.count("succeeded")
    return StoredTasks(
        waiting=sum(states.values()) - states.get(1, 0),
        leased=states.get(1, 0),
        done=done,
        failed=len(endings) - done,
    )

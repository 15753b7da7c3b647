"""Records, and the calls of a task store that a benchmark times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from math import inf
from typing import Any

from forebay.clock import new_id
from forebay.interfaces import Completion, Lease, PutResult, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.task import Priority

AT_ONCE = 1_000  # calls in flight


def new_record(envelope: bytes, task_id: str | None = None) -> TaskRecord:
    """Return a record as a supervisor makes it."""
    return TaskRecord(
        task_id=task_id or new_id(),
        task_type="work",
        priority=Priority.NORMAL,
        envelope=envelope,
        enqueued_at=time.time(),
    )


async def for_each(work: Callable[[Any], Awaitable[Any]], items: list[Any], expected: Any) -> float:
    """Return the seconds to call `work` for each item, by `AT_ONCE` loops that each await the result."""
    left = iter(items)

    async def one() -> None:
        for item in left:
            assert await work(item) is expected

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return time.perf_counter() - started


async def lease_all(
    store: TaskStore, *, batch: int, shares: Mapping[str, int] | None = None, limit: float = inf
) -> tuple[list[Lease], float]:
    """Lease all waiting records, `batch` at a time, or `limit` of them; return the leases and the seconds."""
    leases: list[Lease] = []
    until = time.time() + 1e6
    started = time.perf_counter()
    while len(leases) < limit and (some := await store.lease("work", batch, until=until, shares=shares)):
        leases += some
    return leases, time.perf_counter() - started


async def store_seconds(
    url: str, records: list[TaskRecord], *, batch: int, shares: Mapping[str, int] | None = None
) -> tuple[float, float, float]:
    """Return the seconds to put, lease and finish all `records`."""
    store = open_task_store(url)
    await store.open()

    def finish(lease: Lease) -> Awaitable[bool]:
        completion = Completion(status="succeeded", result=b"result", attempts=1, finished_at=time.time())
        return store.finish(lease.record.task_id, completion, fence=lease.fence)

    putting = await for_each(store.put, records, PutResult.STORED)
    leases, leasing = await lease_all(store, batch=batch, shares=shares)
    assert len(leases) == len(records)
    finishing = await for_each(finish, leases, True)
    await store.prune(before=time.time() + 1.0)  # the next round may use it again
    await store.close()
    return putting, leasing, finishing

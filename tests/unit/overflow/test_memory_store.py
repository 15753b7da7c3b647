"""The task store in memory: it keeps nothing of records, leases and task types that are gone."""

from __future__ import annotations

from forebay.interfaces import Completion, TaskRecord
from forebay.overflow import MemoryTaskStore
from forebay.task import Priority

END = Completion(status="cancelled", finished_at=1.0)


def record(number: int, task_type: str = "t") -> TaskRecord:
    return TaskRecord(
        task_id=f"{number}",
        task_type=task_type,
        priority=Priority.NORMAL,
        envelope=b"",
        enqueued_at=0.0,
        key=f"k{number}",
    )


def size(store: MemoryTaskStore) -> int:
    queues = [heap for of_tenants in store._queues.values() for heap in of_tenants.values()]
    heaps = [*queues, store._leased, *store._ended.values()]
    return sum(len(heap._items) for heap in heaps) + len(store._entries) + len(store._keys) + len(store._queues)


async def test_finished_records_leave_nothing_behind() -> None:
    store = MemoryTaskStore()
    await store.open()
    for number in range(5_000):
        await store.put(record(number))
        await store.finish(f"{number}", END, fence=None)
        await store.prune(before=2.0)
    assert size(store) < 200


async def test_released_leases_leave_nothing_behind() -> None:
    store = MemoryTaskStore()
    await store.open()
    await store.put(record(0))
    for _ in range(5_000):
        leases = await store.lease("t", 1, until=1e9)
        store.renew(leases, until=1e10)
        await store.release(leases)
    assert size(store) < 200


async def test_task_types_without_records_leave_nothing_behind() -> None:
    store = MemoryTaskStore()
    await store.open()
    for number in range(1_000):
        await store.put(record(number, f"type {number}"))
        (lease,) = await store.lease(f"type {number}", 1, until=1e9)
        await store.finish(lease.record.task_id, END, fence=lease.fence)
        await store.prune(before=2.0)
    assert size(store) < 200
    assert await store.depths() == {}

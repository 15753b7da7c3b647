"""What only the ledger in memory has to see to: that nothing of what is gone stays behind."""

from __future__ import annotations

from forebay.interfaces import Completion, TaskRecord
from forebay.overflow import MemoryTaskStore
from forebay.task import Priority

END = Completion(status="cancelled", finished_at=1.0)


def row(number: int, task_type: str = "t") -> TaskRecord:
    return TaskRecord(
        task_id=f"{number}",
        task_type=task_type,
        priority=Priority.NORMAL,
        envelope=b"",
        enqueued_at=0.0,
        key=f"k{number}",
    )


def size(ledger: MemoryTaskStore) -> int:
    heaps = [*ledger._queues.values(), ledger._leased, *ledger._ended.values()]
    return sum(len(heap._items) for heap in heaps) + len(ledger._entries) + len(ledger._keys) + len(ledger._queues)


async def test_what_is_given_up_leaves_nothing_behind() -> None:
    ledger = MemoryTaskStore()
    await ledger.open()
    for number in range(5_000):
        await ledger.put(row(number))
        await ledger.finish(f"{number}", END, fence=None)
        await ledger.prune(before=2.0)
    assert size(ledger) < 200


async def test_leases_that_come_and_go_leave_nothing_behind() -> None:
    ledger = MemoryTaskStore()
    await ledger.open()
    await ledger.put(row(0))
    for _ in range(5_000):
        leases = await ledger.lease("t", 1, until=1e9)
        ledger.renew(leases, until=1e10)
        await ledger.release(leases)
    assert size(ledger) < 200


async def test_task_types_that_come_and_go_leave_nothing_behind() -> None:
    ledger = MemoryTaskStore()
    await ledger.open()
    for number in range(1_000):
        await ledger.put(row(number, f"type {number}"))
        (lease,) = await ledger.lease(f"type {number}", 1, until=1e9)
        await ledger.finish(lease.record.task_id, END, fence=lease.fence)
        await ledger.prune(before=2.0)
    assert size(ledger) < 200
    assert await ledger.depths() == {}

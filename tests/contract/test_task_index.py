"""The promises of a task store that may be the index of a queue service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from tests.support.task_stores import INDEXES, StoreBackend

from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskIndex, TaskRecord
from forebay.overflow import open_task_store
from forebay.task import Priority

if TYPE_CHECKING:
    from tests.contract.conftest import MakeRecord

DONE = Completion(status="succeeded", finished_at=50.0)


@pytest.fixture(params=INDEXES, ids=str)
async def index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TaskIndex]:
    backend: StoreBackend = request.param
    backend.start_server()
    store = open_task_store(backend.url(tmp_path, bound=5))
    await store.open()
    yield cast("TaskIndex", store)
    await store.close()


def ids(leases: list[Lease]) -> list[str]:
    return [lease.record.task_id for lease in leases]


async def reserve(index: TaskIndex, record: TaskRecord) -> Lease:
    assert await index.put(record, fence="mine", until=100.0) is PutResult.STORED
    return Lease(record=record, fence="mine", until=100.0)


async def test_the_records_that_wait_are_leased_by_id(index: TaskIndex, record: MakeRecord) -> None:
    for name in ("a", "b", "held"):
        await index.put(record(name))
    await index.put(record("parked", thread="t"))
    await index.put(record("behind", thread="t"))
    held = await index.lease_ids(["held"], until=100.0)
    leases = list(await index.lease_ids(["b", "unknown", "behind", "held", "a", "\ud800", "a"], until=100.0))
    assert ids(leases) == ["b", "a"]
    assert len({lease.fence for lease in [*held, *leases]}) == 3
    assert await index.depths() == {("research", Priority.NORMAL, "default"): 1}
    assert all([await index.begin_attempt(lease) for lease in leases])
    assert await index.finish("a", DONE, fence=leases[1].fence)
    assert await index.lease_ids(["a"], until=100.0) == []


async def test_a_record_that_was_leased_by_id_is_leased_like_any_other(index: TaskIndex, record: MakeRecord) -> None:
    await index.put(record("a", thread="t"))
    await index.put(record("b", thread="t"))
    (lease,) = await index.lease_ids(["a"], until=10.0)
    await index.release([lease])
    (lease,) = await index.lease_ids(["a"], until=10.0)
    await index.reap(now=11.0, max_attempts=3)
    assert not await index.begin_attempt(lease)
    (lease,) = await index.lease_ids(["a"], until=20.0)
    assert await index.finish("a", DONE, fence=lease.fence)
    assert ids(list(await index.lease_ids(["a", "b"], until=20.0))) == ["b"]


async def test_no_record_is_leased_twice_by_id(index: TaskIndex, record: MakeRecord) -> None:
    await index.put(record("a"))
    leases = await asyncio.gather(*(index.lease_ids(["a"], until=10.0) for _ in range(20)))
    assert sum(len(each) for each in leases) == 1


async def test_a_cancelled_call_leases_nothing_by_id(index: TaskIndex, record: MakeRecord) -> None:
    await index.put(record("a"))
    leasing = asyncio.ensure_future(index.lease_ids(["a"], until=10.0))
    await asyncio.sleep(0)
    if leasing.cancel():
        with pytest.raises(asyncio.CancelledError):
            await leasing
        await index.find("a")  # what it leased after all is being released
    else:
        await index.release(leasing.result())
    assert ids(list(await index.lease_ids(["a"], until=10.0))) == ["a"]


async def test_a_record_takes_the_place_of_a_leased_one(index: TaskIndex, record: MakeRecord) -> None:
    lease = await reserve(index, record("a", of="reserved", key="k"))
    assert await index.put(record("a")) is PutResult.DUPLICATE
    assert await index.put(record("b", key="k")) is PutResult.DUPLICATE
    final = record("a", key="k", priority=Priority.HIGH, thread="t")
    assert await index.replace(lease, final) is PutResult.STORED
    assert await index.find("a") == (RecordState.WAITING, final, None)
    assert await index.find_key("k") == "a"
    assert await index.depths() == {("research", Priority.HIGH, "default"): 1}
    assert await index.conversations() == {"t": 1}
    assert await index.replace(lease, final) is None  # the lease has gone
    await index.reap(now=101.0, max_attempts=1)
    assert await index.find("a") == (RecordState.WAITING, final, None)


async def test_a_record_that_takes_a_place_is_put_leased_or_parked_as_any_other(
    index: TaskIndex, record: MakeRecord
) -> None:
    first, second = record("a", thread="t"), record("b", thread="t")
    lease = await reserve(index, record("a"))
    assert await index.replace(lease, first, fence="yours", until=100.0) is PutResult.STORED
    lease = await reserve(index, record("b"))
    assert await index.replace(lease, second, fence="yours", until=100.0) is PutResult.PARKED
    assert await index.finish("a", DONE, fence="yours")
    assert await index.find("b") == (RecordState.WAITING, second, None)


async def test_a_full_store_has_the_room_that_was_kept(index: TaskIndex, record: MakeRecord) -> None:
    leases = [await reserve(index, record(name)) for name in "abcde"]
    assert await index.put(record()) is PutResult.FULL
    for lease in leases:
        assert await index.replace(lease, lease.record) is PutResult.STORED
    assert await index.put(record()) is PutResult.FULL
    assert ids(list(await index.lease("research", 9, until=100.0))) == list("abcde")


async def test_an_envelope_is_replaced_unless_its_record_is_done(index: TaskIndex, record: MakeRecord) -> None:
    await index.put(record("a"))
    assert await index.set_envelope("a", b"new")
    (lease,) = await index.lease_ids(["a"], until=100.0)
    assert lease.record.envelope == b"new"
    await index.mark_dead(lease, DONE)
    assert await index.set_envelope("a", b"whole")
    found = await index.find("a")
    assert found is not None
    assert found[1].envelope == b"whole"
    await index.requeue("a")
    await index.finish("a", DONE, fence=None)
    assert not await index.set_envelope("a", b"late")
    assert not await index.set_envelope("unknown", b"late")

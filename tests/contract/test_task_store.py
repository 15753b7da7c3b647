"""The promises of every task store."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tests.support.killed_calls import lost_calls
from tests.support.leases import after_failure
from tests.support.task_stores import DURABLE, FAST, HISTORY, ORDER, SHARED, StoreBackend

from forebay.call_usage import CallUsage
from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord, TaskStore, WakeResult
from forebay.task import Priority

if TYPE_CHECKING:
    from tests.contract.conftest import MakeRecord, OpenStore, Take

DONE = Completion(status="succeeded", worker_id="w", result=b"result", duration_ms=1.5, attempts=1, finished_at=50.0)


def ids(leases: list[Lease]) -> list[str]:
    return [lease.record.task_id for lease in leases]


async def state(store: TaskStore, task_id: str) -> RecordState | None:
    found = await store.find(task_id)
    return None if found is None else found[0]


async def renew(store: TaskStore, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
    return await asyncio.get_running_loop().run_in_executor(None, lambda: store.renew(leases, until=until))


async def depths(store: TaskStore) -> dict[tuple[str, Priority], int]:
    """Return how many records wait, of one tenant."""
    return {(task_type, priority): count for (task_type, priority, _), count in (await store.depths()).items()}


async def put_all(store: TaskStore, records: list[TaskRecord]) -> None:
    assert set(await asyncio.gather(*(store.put(record) for record in records))) <= {PutResult.STORED}


# --- putting ---------------------------------------------------------------------------------------------------------


async def test_a_stored_record_is_found_as_it_was_put(
    store: TaskStore, backend: StoreBackend, record: MakeRecord
) -> None:
    stored = record(
        "tâche", of="écrire", priority=Priority.CRITICAL, deadline=123.5, key="schlüssel", envelope=b"\0\xff" * 99
    )
    assert await store.put(stored) is PutResult.STORED
    assert await store.find("tâche") == (RecordState.WAITING, backend.as_found(stored), None)
    assert await store.find_key("schlüssel") == "tâche"


async def test_an_unknown_id_or_key_is_not_found(store: TaskStore) -> None:
    assert await store.find("nothing") is None
    assert await store.find_key("nothing") is None


async def test_an_id_is_stored_once(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a", envelope=b"first"))
    assert await store.put(record("a", envelope=b"second")) is PutResult.DUPLICATE
    assert [lease.record.envelope for lease in await take()] == [b"first"]


async def test_a_key_is_stored_once(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("a", key="k"))
    assert await store.put(record("b", key="k")) is PutResult.DUPLICATE
    assert await store.find("b") is None
    assert await store.find_key("k") == "a"


async def test_leased_records_are_counted_by_their_type(store: TaskStore, record: MakeRecord, take: Take) -> None:
    assert await store.leased() == {}
    await put_all(store, [*(record() for _ in range(3)), record(of="write"), record(of="rest")])
    research, (write,) = await take(2), await take(of="write")
    assert await store.leased() == {"research": 2, "write": 1}
    await store.release([research[0], write])
    assert await store.leased() == {"research": 1}


async def test_records_without_a_key_do_not_collide(store: TaskStore, record: MakeRecord) -> None:
    await put_all(store, [record() for _ in range(3)])


async def test_of_many_with_one_key_at_once_one_is_stored(store: TaskStore, record: MakeRecord) -> None:
    outcomes = await asyncio.gather(*(store.put(record(key="k")) for _ in range(300)))
    assert outcomes.count(PutResult.STORED) == 1
    assert outcomes.count(PutResult.DUPLICATE) == 299
    assert await depths(store) == {("research", Priority.NORMAL): 1}


async def test_a_duplicate_among_many_leaves_the_others_stored(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("a"))
    outcomes = await asyncio.gather(*(store.put(record("a" if number == 150 else None)) for number in range(300)))
    assert [number for number, outcome in enumerate(outcomes) if outcome is not PutResult.STORED] == [150]


async def test_waiting_and_leased_records_are_bounded(open_store: OpenStore, record: MakeRecord) -> None:
    store = await open_store(bound=3)
    outcomes = await asyncio.gather(*(store.put(record()) for _ in range(5)))
    assert list(outcomes) == [PutResult.STORED] * 3 + [PutResult.FULL] * 2
    await store.lease("research", 2, until=100.0)  # leased records count too
    assert await store.put(record()) is PutResult.FULL


async def test_a_finished_record_makes_room(open_store: OpenStore, record: MakeRecord) -> None:
    store = await open_store(bound=1)
    await store.put(record("a"))
    await store.finish("a", DONE, fence=None)
    assert await store.put(record("b")) is PutResult.STORED
    assert await store.put(record("c")) is PutResult.FULL


async def test_a_duplicate_is_reported_as_such_even_if_the_store_is_full(
    open_store: OpenStore, record: MakeRecord
) -> None:
    store = await open_store(bound=1)
    await store.put(record("a", key="k"))
    assert await store.put(record("a")) is PutResult.DUPLICATE
    assert await store.put(record("b", key="k")) is PutResult.DUPLICATE
    assert await store.put(record("b")) is PutResult.FULL


async def test_a_record_put_leased_belongs_to_its_holder(store: TaskStore, record: MakeRecord, take: Take) -> None:
    task = record("a")
    await store.put(task, fence="mine", until=100.0)
    assert await state(store, "a") is RecordState.LEASED
    assert await take() == []
    assert await store.begin_attempt(Lease(record=task, fence="mine", until=100.0))
    assert await store.finish("a", DONE, fence="mine")


# --- conversations ---------------------------------------------------------------------------------------------------


async def test_one_record_of_a_conversation_is_leased_at_a_time_the_oldest_first(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    for name in ("a", "b", "c"):
        await store.put(record(name, thread="t"))
    for name in ("a", "b", "c"):
        (lease,) = await take()
        assert lease.record.task_id == name
        assert await store.finish(name, DONE, fence=lease.fence)
    assert await store.conversations() == {}


async def test_what_is_parked_is_not_counted_as_waiting(store: TaskStore, record: MakeRecord) -> None:
    puts = [await store.put(record(name, thread="t")) for name in ("a", "b", "c")]
    assert puts == [PutResult.STORED, PutResult.PARKED, PutResult.PARKED]
    assert await depths(store) == {("research", Priority.NORMAL): 1}
    assert await store.conversations() == {"t": 3}
    assert await state(store, "b") is RecordState.PARKED


async def test_a_parked_record_keeps_nobody_else_waiting(store: TaskStore, record: MakeRecord, take: Take) -> None:
    for number in range(50):
        await store.put(record(f"hot {number}", thread="hot"))
    await store.put(record("other", thread="other"))
    await store.put(record("none"))
    assert [lease.record.task_id for lease in await take(3)] == ["hot 0", "other", "none"]


async def test_a_conversation_spans_task_types_and_priorities(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a", thread="t", priority=Priority.LOW))
    await store.put(record("b", thread="t", of="write", priority=Priority.CRITICAL))
    assert await take(of="write") == []
    (lease,) = await take()
    await store.finish("a", DONE, fence=lease.fence)
    assert await depths(store) == {("write", Priority.CRITICAL): 1}
    assert [lease.record.task_id for lease in await take(of="write")] == ["b"]


async def test_a_record_put_leased_has_to_wait_for_its_conversation(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    first, second = record("a", thread="t"), record("b", thread="t")
    assert await store.put(first, fence="mine", until=100.0) is PutResult.STORED
    assert await store.put(second, fence="yours", until=100.0) is PutResult.PARKED
    assert not await store.begin_attempt(Lease(record=second, fence="yours", until=100.0))
    await store.finish("a", DONE, fence="mine")
    assert [lease.record.task_id for lease in await take()] == ["b"]


async def test_a_record_put_leased_goes_before_younger_ones_that_wait(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("late", thread="t", enqueued_at=2.0))
    early = record("early", thread="t", enqueued_at=1.0)
    assert await store.put(early, fence="mine", until=100.0) is PutResult.STORED
    assert await depths(store) == {}
    assert await state(store, "late") is RecordState.PARKED
    assert await store.finish("early", DONE, fence="mine")
    assert await state(store, "late") is RecordState.WAITING


async def test_a_record_that_comes_back_stands_before_the_rest_of_its_conversation(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a", thread="t"))
    leases = await take()
    await store.put(record("b", thread="t"))
    await store.release(leases)
    assert await state(store, "b") is RecordState.PARKED
    await take()
    await store.reap(now=101.0, max_attempts=3)
    assert [lease.record.task_id for lease in await take()] == ["a"]


async def test_an_older_record_takes_the_place_of_one_that_waits(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("late", thread="t", enqueued_at=2.0, priority=Priority.LOW))
    assert await store.put(record("early", thread="t", enqueued_at=1.0)) is PutResult.STORED
    assert await depths(store) == {("research", Priority.NORMAL): 1}
    assert [lease.record.task_id for lease in await take()] == ["early"]


async def test_a_conversation_goes_on_after_a_dead_letter_and_after_a_cancellation(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    for name in ("dies", "unreadable", "cancelled", "cancelled while parked", "last"):
        await store.put(record(name, thread="t"))
    (lease,) = await take(until=1.0)
    await store.begin_attempt(lease)
    (dead,) = await store.reap(now=2.0, max_attempts=1)
    assert dead.record.task_id == "dies"
    (lease,) = await take()
    assert lease.record.task_id == "unreadable"
    await store.mark_dead(lease, DONE)
    assert await state(store, "cancelled") is RecordState.WAITING
    assert await store.finish("cancelled while parked", DONE, fence=None)
    assert await store.finish("cancelled", DONE, fence=None)
    assert [lease.record.task_id for lease in await take()] == ["last"]


async def test_ends_of_one_conversation_at_the_same_moment_leave_the_next_one_waiting(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    for name in ("a", "b", "c", "d"):
        await store.put(record(name, thread="t"))
    assert await asyncio.gather(*(store.finish(name, DONE, fence=None) for name in ("a", "b", "c"))) == [True] * 3
    assert await depths(store) == {("research", Priority.NORMAL): 1}
    assert [lease.record.task_id for lease in await take()] == ["d"]


async def test_a_requeued_dead_letter_joins_its_conversation_in_its_old_place(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    for name in ("dies", "runs", "waits"):
        await store.put(record(name, thread="t"))
    (lease,) = await take()
    await store.mark_dead(lease, DONE)
    (running,) = await take()
    assert await store.requeue("dies") is PutResult.STORED
    assert await take() == []
    await store.finish("runs", DONE, fence=running.fence)
    assert [lease.record.task_id for lease in await take()] == ["dies"]


# --- leasing ---------------------------------------------------------------------------------------------------------


async def test_records_are_leased_by_priority_then_deadline_then_order_of_submission(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("low, urgent", priority=Priority.LOW, deadline=1.0))
    await store.put(record("first without deadline"))
    await store.put(record("second without deadline"))
    await store.put(record("later", deadline=20.0))
    await store.put(record("sooner", deadline=10.0))
    await store.put(record("as soon, but submitted later", deadline=10.0))
    await store.put(record("critical", priority=Priority.CRITICAL))
    leases = await take()
    assert ids(leases) == [
        "critical",
        "sooner",
        "as soon, but submitted later",
        "later",
        "first without deadline",
        "second without deadline",
        "low, urgent",
    ]


async def test_the_time_of_submission_counts_and_not_the_time_of_put(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    early, late = record("early"), record("late")
    await store.put(late)
    await store.put(early)
    assert ids(await take()) == ["early", "late"]


async def test_a_lease_may_be_restricted_to_one_priority(store: TaskStore, record: MakeRecord, take: Take) -> None:
    low, high = record("low", priority=Priority.LOW), record("high", priority=Priority.HIGH)
    await put_all(store, [high, low, record("low of another type", of="write", priority=Priority.LOW)])
    leases = await store.lease("research", 9, until=100.0, priority=Priority.LOW)
    assert ids(list(leases)) == ["low"]
    assert list(await store.lease("research", 9, until=100.0, priority=Priority.LOW)) == []
    assert ids(await take()) == ["high"]


async def test_records_put_at_once_are_leased_in_the_order_of_the_calls(
    store: TaskStore, backend: StoreBackend, record: MakeRecord, take: Take
) -> None:
    backend.needs(FAST)
    records = [record() for _ in range(1_100)]  # more than fit into one statement, or one transaction
    await put_all(store, records)
    assert ids(await take()) == [task.task_id for task in records]


async def test_a_lease_is_of_one_task_type_and_no_larger_than_its_limit(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await put_all(store, [record("a"), record("b", of="write"), record("c")])
    assert ids(await take(1)) == ["a"]
    assert ids(await take(5)) == ["c"]
    assert ids(await take(5, of="write")) == ["b"]


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_below_1_leases_nothing(store: TaskStore, record: MakeRecord, take: Take, limit: int) -> None:
    await store.put(record())
    assert await take(limit) == []


async def test_a_lease_has_the_record_its_expiry_and_a_unique_fence(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    records = [record("a", deadline=5.0, key="k"), record("b")]
    await put_all(store, records)
    leases = await take(until=77.0)
    assert [lease.record for lease in leases] == records
    assert [lease.until for lease in leases] == [77.0, 77.0]
    assert len({lease.fence for lease in leases}) == 2


async def test_no_record_is_leased_twice(store: TaskStore, record: MakeRecord) -> None:
    await put_all(store, [record() for _ in range(100)])
    batches = await asyncio.gather(*(store.lease("research", 3, until=100.0) for _ in range(40)))
    leased = [lease.record.task_id for batch in batches for lease in batch]
    assert len(leased) == len(set(leased)) == 100


async def test_a_cancelled_lease_holds_no_record(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b")])
    for steps in range(4):  # before it has begun, during it, at its end
        leasing = asyncio.ensure_future(store.lease("research", 2, until=100.0))
        for _ in range(steps):
            await asyncio.sleep(0)
        if leasing.cancel():
            with pytest.raises(asyncio.CancelledError):
                await leasing
            await store.find("a")  # what it leased after all is being released
        else:
            await store.release(leasing.result())
        leases = await take()
        assert ids(leases) == ["a", "b"]
        await store.release(leases)


async def test_a_cancelled_put_does_not_affect_the_others(store: TaskStore, record: MakeRecord) -> None:
    puts = [asyncio.ensure_future(store.put(record(f"{number}"))) for number in range(10)]
    await asyncio.sleep(0)
    puts[4].cancel()
    outcomes = await asyncio.gather(*puts, return_exceptions=True)
    stored = [outcome for outcome in outcomes if outcome is PutResult.STORED]
    assert len(stored) >= 9
    assert await state(store, "9") is RecordState.WAITING


# --- holding ---------------------------------------------------------------------------------------------------------


async def test_an_attempt_is_counted(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lease,) = await take()
    assert lease.record.attempts == 0
    assert await store.begin_attempt(lease)
    found = await store.find("a")
    assert found is not None
    assert found[1].attempts == 1


async def test_two_attempts_at_once_under_one_lease_are_counted_twice(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a"))
    (lease,) = await take()
    assert all(await asyncio.gather(store.begin_attempt(lease), store.begin_attempt(lease)))
    found = await store.find("a")
    assert found is not None
    assert found[1].attempts == 2


async def test_a_lost_lease_is_rejected_everywhere(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lost,) = await take()
    await store.release([lost])
    (held,) = await take()
    assert lost.fence != held.fence
    assert not await store.begin_attempt(lost)
    assert list(await renew(store, [lost, held], until=200.0)) == [lost]
    await store.release([lost])
    assert not await store.finish("a", DONE, fence=lost.fence)
    assert await state(store, "a") is RecordState.LEASED
    assert await store.begin_attempt(held)


async def test_the_fence_of_another_record_is_rejected(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b")])
    a, b = await take()
    crossed = Lease(record=a.record, fence=b.fence, until=100.0)
    assert not await store.begin_attempt(crossed)
    assert list(await renew(store, [crossed], until=200.0)) == [crossed]
    assert not await store.finish("a", DONE, fence=b.fence)


async def test_among_many_leases_the_lost_ones_are_returned(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record() for _ in range(300)])
    leases = await take()
    lost = leases[7::100]
    await store.release(lost)
    assert list(await renew(store, leases, until=200.0)) == lost
    started = await asyncio.gather(*(store.begin_attempt(lease) for lease in leases))
    assert [lease for lease, done in zip(leases, started, strict=True) if not done] == lost


async def test_released_records_keep_their_order(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b"), record("c", deadline=10.0)])
    leases = await take(2)
    await store.put(record("d"))
    await store.release(leases)
    assert ids(await take()) == ["c", "a", "b", "d"]


async def test_a_released_record_has_the_attempts_that_it_was_leased_with(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await put_all(store, [record("a"), record("b"), record("c")])
    for lease in await take(3, until=100.0):
        await store.begin_attempt(lease)
    await store.reap(now=101.0, max_attempts=9)  # a crash, which counts
    leases = await take(3, until=200.0)
    for lease in leases[:2]:
        await store.begin_attempt(lease)
    await store.release(leases)
    assert [lease.record.attempts for lease in await take(3)] == [1, 1, 1]


async def test_a_released_record_has_the_failures_that_its_lease_counts(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await put_all(store, [record("a"), record("b")])
    first, second = await take()
    failed = after_failure(after_failure(first, wait=2.0), wait=0.5, error="late", usage=USED)
    for lease in (first, first, first, second):
        await store.begin_attempt(lease)
    await store.release([failed, second])
    again, other = await take()
    assert again.record == msgspec.structs.replace(
        first.record, attempts=2, failures=2, total_delay=2.5, last_error="late", usage=USED
    )
    assert other.record == second.record


async def test_failures_that_are_recorded_under_a_lease_are_no_lost_leases(
    store: TaskStore, backend: StoreBackend, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a"))
    (lease,) = await take(until=100.0)
    for _ in range(2):
        await store.begin_attempt(lease)
    failed = after_failure(lease, wait=2.0, error="late", usage=USED)
    assert await store.record_failures(failed)
    found = await store.find("a")
    expected = msgspec.structs.replace(
        lease.record, attempts=2, failures=1, total_delay=2.0, last_error="late", usage=USED
    )
    assert found == (RecordState.LEASED, backend.as_found(expected), None)
    assert await store.begin_attempt(failed)
    assert list(await renew(store, [failed], until=200.0)) == []
    assert list(await store.reap(now=201.0, max_attempts=3)) == []  # two of three were lost
    assert not await store.record_failures(failed)
    (again,) = await take()
    assert again.record == msgspec.structs.replace(expected, attempts=3)


async def test_renewing_or_releasing_no_lease_is_allowed(store: TaskStore) -> None:
    assert list(await renew(store, [], until=200.0)) == []
    await store.release([])


# --- ending ----------------------------------------------------------------------------------------------------------


async def test_a_finished_record_keeps_its_completion_and_drops_its_envelope(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a", key="k"))
    (lease,) = await take()
    await store.begin_attempt(lease)
    assert await store.finish("a", DONE, fence=lease.fence)
    found = await store.find("a")
    assert found is not None
    assert found[0] is RecordState.DONE
    assert (found[1].task_id, found[1].key, found[1].attempts, found[1].envelope) == ("a", "k", 1, b"")
    assert found[2] == DONE


async def test_a_record_ends_once(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lease,) = await take()
    assert await store.finish("a", DONE, fence=lease.fence)
    assert not await store.finish("a", DONE, fence=lease.fence)
    assert not await store.finish("a", DONE, fence=None)
    assert not await store.begin_attempt(lease)
    assert list(await renew(store, [lease], until=200.0)) == [lease]
    await store.release([lease])
    assert await state(store, "a") is RecordState.DONE
    assert await take() == []


async def test_without_a_fence_only_a_waiting_record_ends(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("held"), record("waiting")])
    await take(1)
    assert not await store.finish("held", DONE, fence=None)
    assert await store.finish("waiting", DONE, fence=None)
    assert not await store.finish("unknown", DONE, fence=None)
    assert await take() == []


async def test_with_a_fence_a_waiting_record_does_not_end(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("a"))
    assert not await store.finish("a", DONE, fence="mine")
    assert await state(store, "a") is RecordState.WAITING


@pytest.mark.parametrize("bound", [1, 100])
async def test_the_id_of_a_record_that_is_done_may_be_used_again(
    open_store: OpenStore, backend: StoreBackend, record: MakeRecord, bound: int
) -> None:
    store = await open_store(bound=bound)
    for envelope in (b"first", b"second", b"third"):
        task = record("a", envelope=envelope)
        assert await store.put(task) is PutResult.STORED
        assert await depths(store) == {("research", Priority.NORMAL): 1}
        assert await store.put(record("a")) is PutResult.DUPLICATE
        assert await store.find("a") == (RecordState.WAITING, backend.as_found(task), None)
        await store.finish("a", DONE, fence=None)
    assert await store.prune(before=DONE.finished_at + 1) == 1


async def test_a_record_that_is_done_and_whose_id_is_used_again_makes_way_only_if_that_one_is_stored(
    open_store: OpenStore, record: MakeRecord
) -> None:
    store = await open_store(bound=1)
    await store.put(record("a"))
    await store.finish("a", DONE, fence=None)
    await store.put(record("b", key="k"))
    assert await store.put(record("a", key="k")) is PutResult.DUPLICATE
    assert await store.put(record("a")) is PutResult.FULL
    assert await state(store, "a") is RecordState.DONE


async def test_the_id_of_a_dead_record_is_taken(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lease,) = await take(until=10.0)
    await store.mark_dead(lease, DONE)
    assert await store.put(record("a")) is PutResult.DUPLICATE


async def test_id_and_key_stay_taken_while_the_result_of_a_key_is_kept(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("a", key="k"))
    await store.finish("a", DONE, fence=None)
    assert await store.put(record("a")) is PutResult.DUPLICATE
    assert await store.put(record("b", key="k")) is PutResult.DUPLICATE
    assert await store.prune(before=DONE.finished_at + 1) == 1
    assert await store.find("a") is None
    assert await store.find_key("k") is None
    assert await store.put(record("a", key="k")) is PutResult.STORED


async def test_prune_drops_records_that_ended_before_and_no_others(store: TaskStore, record: MakeRecord) -> None:
    await put_all(store, [record("old"), record("recent"), record("waiting")])
    await store.finish("old", DONE, fence=None)
    await store.finish("recent", Completion(status="failed", finished_at=60.0), fence=None)
    assert await store.prune(before=60.0) == 1
    assert await state(store, "old") is None
    assert await state(store, "recent") is RecordState.DONE
    assert await state(store, "waiting") is RecordState.WAITING


async def test_ended_records_are_bounded_and_the_oldest_dropped_first(
    open_store: OpenStore, record: MakeRecord
) -> None:
    store = await open_store(bound=2)
    for finished_at in (3.0, 1.0, 2.0):
        task_id = f"ended at {finished_at}"
        await store.put(record(task_id, key=task_id))
        await store.finish(task_id, Completion(status="succeeded", finished_at=finished_at), fence=None)
    assert await state(store, "ended at 1.0") is None
    assert await store.find_key("ended at 1.0") is None
    assert await state(store, "ended at 2.0") is RecordState.DONE
    assert await state(store, "ended at 3.0") is RecordState.DONE


@pytest.mark.parametrize("status", ["failed", "timed_out", "cancelled", "expired"])
async def test_a_record_that_is_done_without_success_loses_its_key(
    store: TaskStore, record: MakeRecord, status: str
) -> None:
    await store.put(record("a", key="k"))
    assert await store.finish("a", Completion(status=status, finished_at=50.0), fence=None)
    assert await store.find_key("k") is None
    found = await store.find("a")
    assert found is not None
    assert (found[0], found[1].key) == (RecordState.DONE, None)
    assert await store.put(record("b", key="k")) is PutResult.STORED
    assert await store.put(record("a")) is PutResult.STORED
    assert await store.find_key("k") == "b"


# --- retries ---------------------------------------------------------------------------------------------------------


async def test_a_delayed_record_is_leased_once_it_is_due(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lease,) = await take()
    await store.begin_attempt(lease)
    assert await store.delay(after_failure(lease, wait=4.0, error="ValueError: no", usage=USED), due=10.0)
    assert await state(store, "a") is RecordState.DELAYED
    assert await store.wake(now=9.9) == WakeResult(woken=0, delayed=1, next_due=10.0)
    assert await take() == []
    assert await store.wake(now=10.0) == WakeResult(woken=1, delayed=0, next_due=None)
    (again,) = await take()
    assert again.record == msgspec.structs.replace(
        lease.record, attempts=1, failures=1, total_delay=4.0, last_error="ValueError: no", usage=USED
    )


async def test_failures_and_delays_add_up(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    for number, wait in enumerate([1.0, 2.0]):
        (lease,) = await take()
        await store.begin_attempt(lease)
        await store.delay(after_failure(lease, wait=wait, error=f"error {number}"), due=10.0)
        await store.wake(now=10.0)
    (lease,) = await take()
    record_ = lease.record
    assert (record_.attempts, record_.failures, record_.total_delay) == (2, 2, 3.0)
    assert record_.last_error == "error 1"


async def test_a_lost_lease_delays_nothing(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lost,) = await take()
    await store.release([lost])
    assert not await store.delay(after_failure(lost, error="late"), due=10.0)
    assert await state(store, "a") is RecordState.WAITING
    (held,) = await take()
    assert not await store.delay(after_failure(lost, error="late"), due=10.0)
    assert held.record.failures == 0
    assert await store.begin_attempt(held)


async def test_a_delayed_record_has_no_lease(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lease,) = await take()
    await store.delay(after_failure(lease), due=10.0)
    assert not await store.begin_attempt(lease)
    assert not await store.delay(after_failure(lease), due=20.0)
    assert not await store.mark_dead(lease, DONE)
    assert not await store.finish("a", DONE, fence=lease.fence)
    assert list(await renew(store, [lease], until=200.0)) == [lease]
    await store.release([lease])
    await store.reap(now=1e9, max_attempts=1, latest=2e9)
    assert await store.prune(before=1e9) == 0
    assert await state(store, "a") is RecordState.DELAYED


async def test_a_delayed_record_can_be_cancelled(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a", key="k"), record("b")])
    for lease in await take():
        await store.delay(after_failure(lease), due=10.0)
    assert await store.finish("a", Completion(status="cancelled", finished_at=5.0), fence=None)
    assert await store.wake(now=5.0) == WakeResult(woken=0, delayed=1, next_due=10.0)
    assert await store.wake(now=10.0) == WakeResult(woken=1, delayed=0, next_due=None)
    assert ids(await take()) == ["b"]


async def test_delayed_records_wake_in_their_old_order(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b"), record("c", deadline=50.0)])
    leases = await take()
    for lease, due in zip(leases, (3.0, 2.0, 1.0), strict=True):
        await store.delay(after_failure(lease), due=due)
    await store.put(record("d"))
    assert await store.wake(now=2.0) == WakeResult(woken=2, delayed=1, next_due=3.0)
    assert ids(await take()) == ["a", "b", "d"]
    await store.wake(now=3.0)
    assert ids(await take()) == ["c"]


async def test_delayed_records_are_bounded_and_are_no_depth(open_store: OpenStore, record: MakeRecord) -> None:
    store = await open_store(bound=2)
    await put_all(store, [record("a", key="k"), record("b")])
    for lease in await store.lease("research", 2, until=100.0):
        await store.delay(after_failure(lease), due=10.0)
    assert await depths(store) == {}
    assert await store.put(record()) is PutResult.FULL
    assert await store.put(record("a")) is PutResult.DUPLICATE
    assert await store.put(record(key="k")) is PutResult.DUPLICATE
    assert await store.find_key("k") == "a"
    await store.wake(now=10.0)
    assert await depths(store) == {("research", Priority.NORMAL): 2}


async def test_a_delayed_record_keeps_its_conversation_waiting(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a", thread="t"))
    await store.put(record("b", thread="t"))
    (lease,) = await take()
    assert await store.delay(after_failure(lease), due=10.0)
    assert await take() == []
    assert await store.put(record("c", thread="t"), fence="mine", until=100.0) is PutResult.PARKED
    assert await store.put(record("older", thread="t", enqueued_at=1.0)) is PutResult.PARKED
    assert await store.conversations() == {"t": 4}
    assert await depths(store) == {}
    await store.wake(now=10.0)
    assert await depths(store) == {("research", Priority.NORMAL): 1}
    for name in ("older", "a", "b", "c"):
        (lease,) = await take()
        assert lease.record.task_id == name
        await store.finish(name, DONE, fence=lease.fence)


async def test_a_conversation_goes_on_after_its_delayed_record_is_cancelled(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a", thread="t"))
    await store.put(record("b", thread="t"))
    (lease,) = await take()
    await store.delay(after_failure(lease), due=10.0)
    assert await store.finish("b", DONE, fence=None)
    await store.put(record("c", thread="t"))
    assert await store.finish("a", DONE, fence=None)
    assert ids(await take()) == ["c"]


# --- not before a time -----------------------------------------------------------------------------------------------


async def test_a_record_is_not_leased_before_its_time(
    store: TaskStore, backend: StoreBackend, record: MakeRecord, take: Take
) -> None:
    scheduled = record("a", key="k", not_before=10.0)
    assert await store.put(scheduled, now=9.0) is PutResult.STORED
    assert await store.find("a") == (RecordState.DELAYED, backend.as_found(scheduled), None)
    assert await depths(store) == {}
    assert await store.put(record(key="k")) is PutResult.DUPLICATE
    assert await store.wake(now=9.9) == WakeResult(woken=0, delayed=1, next_due=10.0)
    assert await take() == []
    assert await store.wake(now=10.0) == WakeResult(woken=1, delayed=0, next_due=None)
    (lease,) = await take()
    assert lease.record == scheduled


@pytest.mark.parametrize("not_before", [9.0, 8.0, 0.0, -5.0, None])
async def test_a_record_whose_time_has_come_waits(
    store: TaskStore, record: MakeRecord, take: Take, not_before: float | None
) -> None:
    scheduled = record("a", not_before=not_before)
    assert await store.put(scheduled, now=9.0) is PutResult.STORED
    assert await store.wake(now=9.0) == WakeResult(woken=0, delayed=0, next_due=None)
    assert [lease.record for lease in await take()] == [scheduled]


async def test_a_record_wakes_in_the_order_of_its_submission(
    store: TaskStore, backend: StoreBackend, record: MakeRecord, take: Take
) -> None:
    backend.needs(ORDER)
    await store.put(record("a", not_before=10.0))
    await store.put(record("b", not_before=5.0))
    await put_all(store, [record("c"), record("d", deadline=50.0)])
    await store.wake(now=10.0)
    assert ids(await take()) == ["d", "a", "b", "c"]


async def test_a_record_that_comes_back_does_not_wait_for_its_time_again(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a", not_before=10.0), now=9.0)
    await store.wake(now=10.0)
    (lease,) = await take()
    await store.release([lease])
    (lease,) = await take(until=20.0)
    await store.reap(now=21.0, max_attempts=3)
    (lease,) = await take()
    await store.delay(after_failure(lease), due=3.0)  # a clock that was set back
    assert await store.wake(now=3.0) == WakeResult(woken=1, delayed=0, next_due=None)
    (lease,) = await take()
    await store.mark_dead(lease, UNREADABLE)
    assert await store.requeue("a") is PutResult.STORED
    assert ids(await take()) == ["a"]


async def test_a_record_put_leased_does_not_wait_for_its_time(store: TaskStore, record: MakeRecord, take: Take) -> None:
    assert await store.put(record("a", not_before=10.0), fence="mine", until=5.0, now=1.0) is PutResult.STORED
    assert await state(store, "a") is RecordState.LEASED
    await store.reap(now=6.0, max_attempts=3)
    assert ids(await take()) == ["a"]


async def test_a_record_joins_its_conversation_at_its_time(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("first", thread="t", not_before=10.0), now=9.0)  # a queue hides it for a real second
    await store.put(record("second", thread="t", not_before=10.0), now=9.0)
    assert await store.put(record("now", thread="t"), now=9.0) is PutResult.STORED
    assert await store.conversations() == {"t": 3}
    (running,) = await take()
    assert running.record.task_id == "now"
    assert await store.wake(now=10.0) == WakeResult(woken=2, delayed=0, next_due=None)
    assert await take() == []
    assert await state(store, "first") is RecordState.PARKED
    assert await store.put(record("later", thread="t")) is PutResult.PARKED
    await store.finish("now", DONE, fence=running.fence)
    for name in ("first", "second", "later"):
        (lease,) = await take()
        assert lease.record.task_id == name
        await store.finish(name, DONE, fence=lease.fence)
    assert await store.conversations() == {}


async def test_a_scheduled_record_can_be_cancelled(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a", thread="t", key="k", not_before=10.0))
    await store.put(record("b", thread="t"))
    assert await store.finish("a", Completion(status="cancelled", finished_at=5.0), fence=None)
    assert await store.conversations() == {"t": 1}
    assert await store.find_key("k") is None
    assert await store.wake(now=10.0) == WakeResult(woken=0, delayed=0, next_due=None)
    assert ids(await take()) == ["b"]


async def test_a_scheduled_record_is_bounded_and_kept(open_store: OpenStore, record: MakeRecord) -> None:
    store = await open_store(bound=2)
    await store.put(record("a", not_before=10.0))
    await store.put(record("b", not_before=10.0, thread="t"))
    assert await store.put(record()) is PutResult.FULL
    await store.close()
    await store.open()
    assert await store.wake(now=9.0) == WakeResult(woken=0, delayed=2, next_due=10.0)


# --- retries and lost leases -----------------------------------------------------------------------------------------


async def test_attempts_that_ended_with_an_error_are_no_lost_leases(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a"))
    for _ in range(5):
        (lease,) = await take(until=10.0)
        await store.begin_attempt(lease)
        await store.delay(after_failure(lease), due=10.0)
        await store.wake(now=10.0)
    for lost in range(2):
        (lease,) = await take(until=10.0)
        await store.begin_attempt(lease)
        dead = await store.reap(now=11.0, max_attempts=2)
        assert len(dead) == lost
    assert dead[0].record.attempts == 7
    assert dead[0].record.failures == 5


async def test_a_requeued_dead_letter_has_no_failures(store: TaskStore, record: MakeRecord, take: Take) -> None:
    fresh = record("a")
    await store.put(fresh)
    (lease,) = await take()
    await store.begin_attempt(lease)
    await store.delay(after_failure(lease, usage=USED), due=10.0)
    await store.wake(now=10.0)
    (lease,) = await take()
    await store.mark_dead(lease, UNREADABLE)
    assert await store.requeue("a") is PutResult.STORED
    assert [lease.record for lease in await take()] == [fresh]


async def test_a_record_is_put_with_its_failures(store: TaskStore, backend: StoreBackend, record: MakeRecord) -> None:
    failed = msgspec.structs.replace(record("a"), attempts=3, failures=2, total_delay=1.5, last_error="no", usage=USED)
    await store.put(failed)
    assert await store.find("a") == (RecordState.WAITING, backend.as_found(failed), None)


async def test_thousands_of_delayed_records_wake_like_a_few(
    store: TaskStore, backend: StoreBackend, record: MakeRecord, take: Take
) -> None:
    backend.needs(FAST)
    await put_all(store, [record() for _ in range(1_200)])
    delays = [store.delay(after_failure(lease), due=10.0) for lease in await take()]
    assert all(await asyncio.gather(*delays))
    assert await store.wake(now=11.0) == WakeResult(woken=1_200, delayed=0, next_due=None)
    assert await depths(store) == {("research", Priority.NORMAL): 1_200}


# --- expiry ----------------------------------------------------------------------------------------------------------


async def test_an_expired_record_waits_again_in_its_old_order(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b")])
    (lease,) = await take(1, until=10.0)
    await store.begin_attempt(lease)
    assert list(await store.reap(now=10.0, max_attempts=3)) == []
    assert await state(store, "a") is RecordState.LEASED  # it expires after 10, not at 10
    assert list(await store.reap(now=10.1, max_attempts=3)) == []
    assert not await store.finish("a", DONE, fence=lease.fence)
    leases = await take()
    assert ids(leases) == ["a", "b"]
    assert leases[0].record.attempts == 1


async def test_a_record_with_too_many_attempts_becomes_dead(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a", key="k", envelope=b"for the post-mortem"))
    for _ in range(2):
        (lease,) = await take(until=10.0)
        await store.begin_attempt(lease)
        dead = await store.reap(now=11.0, max_attempts=2)
    records = [each.record for each in dead]
    assert [(task.task_id, task.attempts, task.envelope) for task in records] == [("a", 2, b"for the post-mortem")]
    assert await take() == []
    found = await store.find("a")
    assert found is not None
    assert found[0] is RecordState.DEAD
    assert found[1:] == (dead[0].record, dead[0].completion)
    completion = found[2]
    assert completion is not None
    assert (completion.status, completion.attempts, completion.finished_at) == ("failed", 2, 11.0)
    assert completion.error is not None


async def test_a_dead_record_does_not_take_its_key(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a", key="k"))
    (lease,) = await take(until=10.0)
    await store.begin_attempt(lease)
    await store.reap(now=11.0, max_attempts=1)
    assert await store.find_key("k") is None
    assert await store.put(record("b", key="k")) is PutResult.STORED
    assert await store.put(record("c", key="k")) is PutResult.DUPLICATE
    assert await store.find_key("k") == "b"
    assert await store.delete_dead("a")
    assert await store.find_key("k") == "b"


async def test_a_lease_that_expires_before_a_start_counts_no_attempt(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a"))
    for _ in range(5):
        await take(until=10.0)
        assert list(await store.reap(now=11.0, max_attempts=1)) == []
    assert [lease.record.attempts for lease in await take()] == [0]


async def test_a_renewed_lease_does_not_expire(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lease,) = await take(until=10.0)
    await renew(store, [lease], until=20.0)
    await store.reap(now=15.0, max_attempts=3)
    assert await state(store, "a") is RecordState.LEASED
    await store.reap(now=21.0, max_attempts=3)
    assert await state(store, "a") is RecordState.WAITING


async def test_a_renewed_lease_may_end_earlier_than_before(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b")])
    leases = await take(2, until=20.0)
    await renew(store, leases[:1], until=5.0)
    await store.reap(now=5.0, max_attempts=3)
    assert await state(store, "a") is RecordState.LEASED
    await store.reap(now=10.0, max_attempts=3)
    assert await state(store, "a") is RecordState.WAITING
    assert await state(store, "b") is RecordState.LEASED


async def test_a_lease_that_ends_later_than_any_can_is_reaped(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b")])
    near, far = [(await take(1, until=until))[0] for until in (20.0, 3600.0)]
    await store.reap(now=10.0, max_attempts=3, latest=3600.0)
    assert await state(store, far.record.task_id) is RecordState.LEASED
    await store.reap(now=10.0, max_attempts=3, latest=100.0)
    assert await state(store, far.record.task_id) is RecordState.WAITING
    assert await state(store, near.record.task_id) is RecordState.LEASED
    assert list(await renew(store, [near, far], until=30.0)) == [far]


@pytest.mark.blocks  # as a handler may
async def test_leases_are_renewed_while_the_event_loop_is_blocked(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await put_all(store, [record(), record()])
    leases = await take(until=10.0)
    with ThreadPoolExecutor(1) as thread:
        assert list(thread.submit(store.renew, leases, until=20.0).result(timeout=10.0)) == []
    await store.reap(now=15.0, max_attempts=3)
    assert await depths(store) == {}


async def test_a_record_put_leased_expires_like_any_other(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"), fence="gone with its process", until=10.0)
    await store.reap(now=11.0, max_attempts=3)
    assert ids(await take()) == ["a"]


async def test_thousands_of_records_expire_and_are_pruned_like_a_few(
    store: TaskStore, backend: StoreBackend, record: MakeRecord, take: Take
) -> None:
    backend.needs(FAST)
    await put_all(store, [record() for _ in range(1_200)])
    leases = await take(until=10.0)
    await asyncio.gather(*(store.begin_attempt(lease) for lease in leases[::2]))
    assert len(await store.reap(now=11.0, max_attempts=1)) == 600
    assert await depths(store) == {("research", Priority.NORMAL): 600}
    leases = await take()
    await asyncio.gather(*(store.finish(lease.record.task_id, DONE, fence=lease.fence) for lease in leases))
    assert await store.prune(before=DONE.finished_at + 1.0) == 600


# --- dead records ----------------------------------------------------------------------------------------------------

USED = CallUsage(calls=3, input_tokens=700, usd=0.25, unfinished=1)
UNREADABLE = Completion(status="failed", error="it cannot be read", finished_at=60.0)


async def kill_waiting(store: TaskStore, take: Take, *finished_at: float) -> None:
    """Mark waiting records dead, one after the other."""
    for at in finished_at:
        (lease,) = await take(1)
        assert await store.mark_dead(lease, msgspec.structs.replace(UNREADABLE, finished_at=at))


async def test_a_record_that_cannot_be_run_is_kept_whole(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a", envelope=b"damaged"))
    (lease,) = await take()
    assert await store.mark_dead(lease, UNREADABLE)
    assert await take() == []
    assert await store.find("a") == (RecordState.DEAD, lease.record, UNREADABLE)


async def test_only_its_holder_may_mark_a_record_dead(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    (lost,) = await take()
    await store.release([lost])
    assert not await store.mark_dead(lost, UNREADABLE)
    assert await state(store, "a") is RecordState.WAITING


async def test_dead_records_are_listed_in_pages_without_their_envelopes(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await put_all(store, [record(f"dead {number}") for number in range(5)])
    await kill_waiting(store, take, 5.0, 4.0, 4.0, 2.0, 1.0)
    await store.put(record("alive"))
    first = await store.list_records(RecordState.DEAD, 3)
    assert [dead.position for dead in first] == [(1.0, "dead 4"), (2.0, "dead 3"), (4.0, "dead 1")]
    assert {dead.record.envelope for dead in first} == {b""}
    assert first[0].completion is not None
    assert first[0].completion.error == "it cannot be read"
    assert first[0].until is None
    await store.delete_dead("dead 1")  # the last of the page
    second = await store.list_records(RecordState.DEAD, 3, after=(4.0, "dead 1"))
    assert [dead.record.task_id for dead in second] == ["dead 2", "dead 0"]
    assert list(await store.list_records(RecordState.DEAD, 3, after=(5.0, "dead 0"))) == []
    assert list(await store.list_records(RecordState.DEAD, 0)) == []


async def test_records_of_every_state_are_listed(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("held", thread="t"), record("delayed"), record("done"), record("dead")])
    leases = {lease.record.task_id: lease for lease in await take(until=70.0)}
    await store.delay(after_failure(leases["delayed"]), due=10.0)
    await store.finish("done", DONE, fence=leases["done"].fence)
    await store.mark_dead(leases["dead"], UNREADABLE)
    await store.put(record("scheduled", not_before=20.0))
    await store.put(record("parked", thread="t"))
    await put_all(store, [record("b", enqueued_at=1.0), record("a", enqueued_at=1.0), record("waiting")])
    found = {
        state: [(each.record.task_id, each.until, each.completion) for each in await store.list_records(state, 9)]
        for state in RecordState
    }
    assert found == {
        RecordState.WAITING: [("a", None, None), ("b", None, None), ("waiting", None, None)],
        RecordState.PARKED: [("parked", None, None)],
        RecordState.LEASED: [("held", 70.0, None)],
        RecordState.DELAYED: [("delayed", 10.0, None), ("scheduled", 20.0, None)],
        RecordState.DONE: [("done", None, DONE)],
        RecordState.DEAD: [("dead", None, UNREADABLE)],
    }
    page = await store.list_records(RecordState.WAITING, 2)
    assert {each.record.envelope for each in page} == {b""}
    rest = await store.list_records(RecordState.WAITING, 2, after=page[-1].position)
    assert [each.record.task_id for each in rest] == ["waiting"]


async def test_a_requeued_record_keeps_its_order_and_starts_with_no_attempts(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await put_all(store, [record("a", envelope=b"whole"), record("b")])
    (lease,) = await take(1, until=10.0)
    await store.begin_attempt(lease)
    await store.reap(now=11.0, max_attempts=1)
    assert await store.requeue("a") is PutResult.STORED
    assert list(await store.list_records(RecordState.DEAD, 9)) == []
    assert await depths(store) == {("research", Priority.NORMAL): 2}
    again, _ = await take()
    assert (again.record.task_id, again.record.attempts, again.record.envelope) == ("a", 0, b"whole")


async def test_a_dead_record_is_not_requeued_while_another_has_its_key(
    open_store: OpenStore, record: MakeRecord
) -> None:
    store = await open_store(bound=1)
    await store.put(record("a", key="k"))
    (lease,) = await store.lease("research", 1, until=10.0)
    await store.mark_dead(lease, UNREADABLE)
    await store.put(record("b", key="k"))
    assert await store.requeue("a") is PutResult.DUPLICATE
    assert await state(store, "a") is RecordState.DEAD
    await store.finish("b", Completion(status="expired", finished_at=50.0), fence=None)
    assert await store.requeue("a") is PutResult.STORED
    assert await store.find_key("k") == "a"
    assert await store.put(record("c", key="k")) is PutResult.DUPLICATE


async def test_a_dead_record_makes_way_for_the_same_id_and_key(
    open_store: OpenStore, backend: StoreBackend, record: MakeRecord
) -> None:
    store = await open_store(bound=1)
    await store.put(record("a", key="k"))
    (lease,) = await store.lease("research", 1, until=10.0)
    await store.mark_dead(lease, UNREADABLE)
    assert await store.put(record("a")) is PutResult.DUPLICATE
    assert await store.put(record("a", key="l")) is PutResult.DUPLICATE
    again = record("a", key="k", envelope=b"again")
    assert await store.put(again) is PutResult.STORED
    assert await store.find("a") == (RecordState.WAITING, backend.as_found(again), None)
    assert list(await store.list_records(RecordState.DEAD, 9)) == []
    assert await store.put(record()) is PutResult.FULL


async def test_a_full_store_requeues_no_dead_record(open_store: OpenStore, record: MakeRecord) -> None:
    store = await open_store(bound=1)
    await store.put(record("a"))
    (lease,) = await store.lease("research", 1, until=10.0)
    await store.mark_dead(lease, UNREADABLE)
    await store.put(record("b"))
    assert await store.requeue("a") is PutResult.FULL
    assert await state(store, "a") is RecordState.DEAD
    await store.finish("b", DONE, fence=None)
    assert await store.requeue("a") is PutResult.STORED
    assert await store.put(record("c")) is PutResult.FULL


@pytest.mark.parametrize("task_id", ["waiting", "held", "done", "unknown"])
async def test_only_dead_records_are_requeued_or_deleted(
    store: TaskStore, record: MakeRecord, take: Take, task_id: str
) -> None:
    await put_all(store, [record("held"), record("waiting"), record("done")])
    await take(1)
    await store.finish("done", DONE, fence=None)
    before = await store.find(task_id)
    assert await store.requeue(task_id) is None
    assert not await store.delete_dead(task_id)
    assert await store.find(task_id) == before


async def test_a_deleted_record_is_gone_and_its_id_free(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await store.put(record("a"))
    await kill_waiting(store, take, 5.0)
    assert await store.delete_dead("a")
    assert not await store.delete_dead("a")
    assert await store.find("a") is None
    assert await store.put(record("a")) is PutResult.STORED


async def test_dead_records_are_bounded_apart_from_results(open_store: OpenStore, record: MakeRecord) -> None:
    store = await open_store(bound=2)

    async def take(limit: int) -> list[Lease]:
        return list(await store.lease("research", limit, until=100.0))

    for number in range(5):
        await store.put(record(f"dead {number}"))
        await kill_waiting(store, take, float(number))
        for _ in range(3):
            await store.put(record(done := f"done {number}"))
            await store.finish(done, DONE, fence=None)
    assert [dead.record.task_id for dead in await store.list_records(RecordState.DEAD, 9)] == ["dead 3", "dead 4"]
    assert await state(store, "dead 0") is None
    assert await state(store, "done 4") is RecordState.DONE


# --- counting --------------------------------------------------------------------------------------------------------


async def test_depths_count_waiting_records_by_type_and_priority(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    assert await depths(store) == {}
    await put_all(store, [record("a"), record("b"), record("c", of="write", priority=Priority.LOW)])
    await store.put(record("held"), fence="mine", until=10.0)
    assert await depths(store) == {("research", Priority.NORMAL): 2, ("write", Priority.LOW): 1}
    leases = await take()
    assert await depths(store) == {("write", Priority.LOW): 1}
    await store.release(leases[:1])
    assert await depths(store) == {("research", Priority.NORMAL): 1, ("write", Priority.LOW): 1}
    await store.finish("c", DONE, fence=None)
    await store.finish("b", DONE, fence=leases[1].fence)
    await store.reap(now=11.0, max_attempts=1)
    assert await depths(store) == {("research", Priority.NORMAL): 2}
    await store.prune(before=1e6)
    assert await depths(store) == {("research", Priority.NORMAL): 2}


# --- opening and closing ---------------------------------------------------------------------------------------------


async def test_a_store_says_whether_it_is_durable(store: TaskStore, backend: StoreBackend) -> None:
    assert store.durable is (DURABLE in backend.can)


async def test_open_and_close_may_be_repeated(store: TaskStore, record: MakeRecord) -> None:
    await store.open()
    await store.put(record())
    await store.close()
    await store.close()


async def test_a_closed_store_raises(store: TaskStore, record: MakeRecord) -> None:
    await store.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.put(record())
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.lease("research", 1, until=1.0)
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.find("a")
    with pytest.raises(StoreUnavailable, match="not open"):
        store.renew([], until=1.0)


async def test_close_finishes_the_pending_operations(store: TaskStore, record: MakeRecord) -> None:
    puts = [asyncio.ensure_future(store.put(record())) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.gather(store.close(), store.close())
    assert await asyncio.gather(*puts) == [PutResult.STORED] * 10


async def test_a_cancelled_close_still_closes(store: TaskStore, record: MakeRecord) -> None:
    closing = asyncio.ensure_future(store.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    await store.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.put(record())


async def test_the_same_store_opened_again_has_its_records(store: TaskStore, record: MakeRecord, take: Take) -> None:
    await put_all(store, [record("a"), record("b")])
    await store.close()
    await store.open()
    assert ids(await take()) == ["a", "b"]


async def test_a_lease_is_held_past_its_time_until_it_is_reaped(
    store: TaskStore, record: MakeRecord, take: Take
) -> None:
    await store.put(record("a"))
    (lease,) = await take(until=10.0)  # long ago
    assert await store.begin_attempt(lease)
    assert list(await renew(store, [lease], until=20.0)) == []
    assert await store.finish("a", DONE, fence=lease.fence)


async def test_a_durable_store_has_its_records_when_opened_again(
    store: TaskStore, backend: StoreBackend, open_store: OpenStore, record: MakeRecord, take: Take
) -> None:
    backend.needs(HISTORY)
    await put_all(store, [record("held", priority=Priority.HIGH), record("a"), record("b"), record("done", key="k")])
    (held,) = await take(1)
    await store.begin_attempt(held)
    await store.finish("done", DONE, fence=None)
    await store.close()

    again = await open_store()
    assert ids(list(await again.lease("research", 9, until=100.0))) == ["a", "b"]
    assert await again.find_key("k") == "done"
    found = await again.find("done")
    assert found is not None
    assert found[2] == DONE
    assert await again.finish("held", DONE, fence=held.fence)


def test_an_acknowledged_write_survives_the_death_of_its_process(backend: StoreBackend, tmp_path: Path) -> None:
    backend.needs(HISTORY)
    assert lost_calls(backend, tmp_path) == []


async def test_two_openings_of_a_shared_store_agree(
    store: TaskStore, backend: StoreBackend, open_store: OpenStore, record: MakeRecord
) -> None:
    backend.needs(SHARED)
    other = await open_store()
    await put_all(store, [record() for _ in range(50)])
    await put_all(other, [record() for _ in range(50)])
    batches = await asyncio.gather(*(each.lease("research", 7, until=100.0) for each in [store, other] * 10))
    leased = [lease for batch in batches for lease in batch]
    assert len({lease.record.task_id for lease in leased}) == len(leased) == 100
    assert list(await renew(other, leased, until=200.0)) == []
    await store.release(leased[:1])
    assert not await other.begin_attempt(leased[0])
    assert await depths(store) == await depths(other) == {("research", Priority.NORMAL): 1}
    assert await other.put(leased[0].record) is PutResult.DUPLICATE


@pytest.mark.parametrize("end", ["finish", "mark_dead", "reap"])
async def test_a_process_with_a_smaller_bound_drops_nothing_of_the_others(
    backend: StoreBackend, open_store: OpenStore, record: MakeRecord, end: str
) -> None:
    backend.needs(SHARED)
    large, small = await open_store(bound=5), await open_store(bound=1)
    await put_all(large, [record() for _ in range(5)])
    assert await small.put(record("late")) is PutResult.FULL
    leases = list(await small.lease("research", 9, until=100.0))
    for lease in leases:
        if end == "finish":
            await small.finish(lease.record.task_id, DONE, fence=lease.fence)
        elif end == "mark_dead":
            await small.mark_dead(lease, UNREADABLE)
    await small.reap(now=101.0, max_attempts=0)
    assert await small.put(record("last")) is PutResult.STORED
    (lease,) = await small.lease("research", 9, until=100.0)
    await (small.finish("last", DONE, fence=lease.fence) if end == "finish" else small.mark_dead(lease, UNREADABLE))
    ended = RecordState.DONE if end == "finish" else RecordState.DEAD
    assert len(await large.list_records(ended, 9)) == 5


# --- tenants ---------------------------------------------------------------------------------------------------------


class Notified:
    """Counts what a store notices."""

    def __init__(self, store: TaskStore) -> None:
        self.waiting = asyncio.Event()
        self.ended = asyncio.Event()
        store.subscribe(on_waiting=self.waiting.set, on_ended=self.ended.set)

    async def settle(self) -> None:
        """Wait until the store has noticed everything that has happened."""
        self.waiting.clear()
        self.ended.clear()
        while await is_set_within(self.waiting, 0.2) or self.ended.is_set():
            self.waiting.clear()
            self.ended.clear()


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await event.wait()
    return False


async def test_what_another_process_stores_or_ends_is_noticed(
    backend: StoreBackend, open_store: OpenStore, record: MakeRecord
) -> None:
    backend.needs(SHARED)
    store, other = await open_store(), await open_store()
    notified = Notified(store)
    await notified.settle()
    await other.put(record("a"))
    assert await is_set_within(notified.waiting, 5.0)
    (lease,) = await other.lease("research", 1, until=100.0)
    await notified.settle()
    await other.finish("a", DONE, fence=lease.fence)
    assert await is_set_within(notified.ended, 5.0)
    await other.put(record("b"))
    (lease,) = await other.lease("research", 1, until=100.0)
    await notified.settle()
    await other.release([lease])
    assert await is_set_within(notified.waiting, 5.0)
    (lease,) = await other.lease("research", 1, until=100.0)
    await notified.settle()
    await other.mark_dead(lease, UNREADABLE)
    assert await is_set_within(notified.ended, 5.0)


async def test_what_this_process_does_is_not_noticed(
    backend: StoreBackend, open_store: OpenStore, record: MakeRecord
) -> None:
    backend.needs(SHARED)
    store = await open_store()
    await open_store()
    notified = Notified(store)
    await notified.settle()
    await store.put(record("a"))
    assert not await is_set_within(notified.waiting, 0.2)


async def test_every_end_is_noticed_though_as_many_are_kept_as_may_be(
    backend: StoreBackend, open_store: OpenStore, record: MakeRecord
) -> None:
    backend.needs(SHARED)
    store, other = await open_store(bound=2), await open_store(bound=2)
    notified = Notified(store)
    for number in range(5):
        await other.put(record(f"{number}"))
        await notified.settle()
        await other.finish(f"{number}", msgspec.structs.replace(DONE, finished_at=50.0 + number), fence=None)
        assert await is_set_within(notified.ended, 5.0)


async def test_a_closed_store_notices_nothing_and_one_opened_again_does(
    backend: StoreBackend, open_store: OpenStore, record: MakeRecord
) -> None:
    backend.needs(SHARED)
    store, other = await open_store(), await open_store()
    notified = Notified(store)
    await notified.settle()
    await store.close()
    await other.put(record("a"))
    assert not await is_set_within(notified.waiting, 0.2)
    await store.open()
    assert await is_set_within(notified.waiting, 5.0)


async def test_each_tenant_has_a_share_of_what_is_leased(store: TaskStore, record: MakeRecord) -> None:
    await put_all(store, [record(f"a {number}", tenant="a") for number in range(9)])
    await put_all(store, [record(f"b {number}", tenant="b") for number in range(2)])
    await put_all(store, [record("c", tenant="c"), record("best", tenant="a", priority=Priority.HIGH)])
    normal = Priority.NORMAL
    leases = await store.lease("research", 10, until=9.0, priority=normal, shares={"b": 3, "a": 2, "nobody": 1})
    assert ids(list(leases)) == ["b 0", "b 1", "a 0", "a 1"]
    assert await store.depths() == {
        ("research", Priority.HIGH, "a"): 1,
        ("research", normal, "a"): 7,
        ("research", normal, "c"): 1,
    }
    leases = await store.lease("research", 3, until=9.0, priority=normal, shares={"a": 2, "c": 2, "b": 2})
    assert ids(list(leases)) == ["a 2", "a 3", "c"]
    assert await store.lease("research", 1, until=9.0, shares={}) == []
    assert ids(list(await store.lease("research", 2, until=9.0, shares={"a": 1, "c": 1}))) == ["best", "a 4"]


async def test_the_records_of_one_tenant_keep_their_order(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("late", tenant="a", enqueued_at=9.0))
    await store.put(record("urgent", tenant="a", enqueued_at=8.0, deadline=100.0))
    await store.put(record("early", tenant="a", enqueued_at=7.0))
    await store.put(record("other", tenant="b", enqueued_at=1.0))
    leases = await store.lease("research", 5, until=9.0, shares={"a": 5})
    assert ids(list(leases)) == ["urgent", "early", "late"]
    assert {lease.record.tenant for lease in leases} == {"a"}


async def test_without_shares_the_tenants_make_no_difference(store: TaskStore, record: MakeRecord) -> None:
    for number in range(6):
        await store.put(record(f"task {number}", tenant="ab"[number % 2]))
    assert ids(list(await store.lease("research", 5, until=9.0))) == [f"task {number}" for number in range(5)]


async def test_a_record_keeps_its_tenant_until_it_has_ended(store: TaskStore, record: MakeRecord) -> None:
    await store.put(record("one", tenant="acmé", thread="t"))
    await store.put(record("two", tenant="other", thread="t"))
    waiting = {("research", Priority.NORMAL, "acmé"): 1}
    assert await store.depths() == waiting
    (lease,) = await store.lease("research", 1, until=9.0)
    await store.release([lease])
    assert await store.depths() == waiting
    (lease,) = await store.lease("research", 1, until=9.0)
    assert await store.delay(after_failure(lease, error="failed"), due=10.0)
    assert await store.depths() == {}
    await store.wake(now=11.0)
    assert await store.depths() == waiting
    assert await store.finish("one", DONE, fence=None)
    assert await store.depths() == {("research", Priority.NORMAL, "other"): 1}
    found = await store.find("one")
    assert found is not None
    assert found[1].tenant == "acmé"

"""What every ledger promises."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import pytest

from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord, TaskStore
from forebay.task import Priority

if TYPE_CHECKING:
    from tests.contract.conftest import MakeRecord, OpenStore, StoreBackend, Take

DONE = Completion(status="succeeded", worker_id="w", result=b"result", duration_ms=1.5, attempts=1, finished_at=50.0)


def ids(leases: list[Lease]) -> list[str]:
    return [lease.record.task_id for lease in leases]


async def state(ledger: TaskStore, task_id: str) -> RecordState | None:
    found = await ledger.find(task_id)
    return None if found is None else found[0]


async def renew(ledger: TaskStore, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
    return await asyncio.get_running_loop().run_in_executor(None, lambda: ledger.renew(leases, until=until))


async def put_all(ledger: TaskStore, rows: list[TaskRecord]) -> None:
    assert set(await asyncio.gather(*(ledger.put(row) for row in rows))) <= {PutResult.STORED}


# --- putting ---------------------------------------------------------------------------------------------------------


async def test_a_stored_row_is_found_as_it_was_put(ledger: TaskStore, row: MakeRecord) -> None:
    task = row(
        "tâche", of="écrire", priority=Priority.CRITICAL, deadline=123.5, key="schlüssel", envelope=b"\0\xff" * 99
    )
    assert await ledger.put(task) is PutResult.STORED
    assert await ledger.find("tâche") == (RecordState.WAITING, task, None)
    assert await ledger.find_key("schlüssel") == "tâche"


async def test_what_was_never_put_is_not_found(ledger: TaskStore) -> None:
    assert await ledger.find("nothing") is None
    assert await ledger.find_key("nothing") is None


async def test_an_id_is_stored_once(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.put(row("a", envelope=b"first"))
    assert await ledger.put(row("a", envelope=b"second")) is PutResult.DUPLICATE
    found = await ledger.find("a")
    assert found is not None
    assert found[1].envelope == b"first"


async def test_a_key_is_stored_once(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.put(row("a", key="k"))
    assert await ledger.put(row("b", key="k")) is PutResult.DUPLICATE
    assert await ledger.find("b") is None
    assert await ledger.find_key("k") == "a"


async def test_rows_without_key_do_not_collide(ledger: TaskStore, row: MakeRecord) -> None:
    await put_all(ledger, [row() for _ in range(3)])


async def test_of_many_with_one_key_at_once_one_is_stored(ledger: TaskStore, row: MakeRecord) -> None:
    outcomes = await asyncio.gather(*(ledger.put(row(key="k")) for _ in range(300)))
    assert outcomes.count(PutResult.STORED) == 1
    assert outcomes.count(PutResult.DUPLICATE) == 299
    assert await ledger.depths() == {("research", Priority.NORMAL): 1}


async def test_a_duplicate_among_many_leaves_the_others_stored(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.put(row("a"))
    outcomes = await asyncio.gather(*(ledger.put(row("a" if number == 150 else None)) for number in range(300)))
    assert [number for number, outcome in enumerate(outcomes) if outcome is not PutResult.STORED] == [150]


async def test_it_holds_no_more_than_its_bound(another: OpenStore, row: MakeRecord) -> None:
    ledger = await another(bound=3)
    outcomes = await asyncio.gather(*(ledger.put(row()) for _ in range(5)))
    assert list(outcomes) == [PutResult.STORED] * 3 + [PutResult.FULL] * 2
    await ledger.lease("research", 2, until=100.0)  # held all the same
    assert await ledger.put(row()) is PutResult.FULL


async def test_what_ends_makes_room(another: OpenStore, row: MakeRecord) -> None:
    ledger = await another(bound=1)
    await ledger.put(row("a"))
    await ledger.finish("a", DONE, fence=None)
    assert await ledger.put(row("b")) is PutResult.STORED
    assert await ledger.put(row("c")) is PutResult.FULL


async def test_a_duplicate_is_one_also_when_there_is_no_room(another: OpenStore, row: MakeRecord) -> None:
    ledger = await another(bound=1)
    await ledger.put(row("a", key="k"))
    assert await ledger.put(row("a")) is PutResult.DUPLICATE
    assert await ledger.put(row("b", key="k")) is PutResult.DUPLICATE
    assert await ledger.put(row("b")) is PutResult.FULL


async def test_a_row_put_leased_is_its_holders(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    task = row("a")
    await ledger.put(task, fence="mine", until=100.0)
    assert await state(ledger, "a") is RecordState.LEASED
    assert await take() == []
    assert await ledger.begin_attempt(Lease(record=task, fence="mine", until=100.0))
    assert await ledger.finish("a", DONE, fence="mine")


# --- leasing ---------------------------------------------------------------------------------------------------------


async def test_a_lease_takes_priority_then_deadline_then_who_came_first(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    await ledger.put(row("low, urgent", priority=Priority.LOW, deadline=1.0))
    await ledger.put(row("first without deadline"))
    await ledger.put(row("second without deadline"))
    await ledger.put(row("later", deadline=20.0))
    await ledger.put(row("sooner", deadline=10.0))
    await ledger.put(row("as soon, but after", deadline=10.0))
    await ledger.put(row("critical", priority=Priority.CRITICAL))
    leases = await take()
    assert ids(leases) == [
        "critical",
        "sooner",
        "as soon, but after",
        "later",
        "first without deadline",
        "second without deadline",
        "low, urgent",
    ]


async def test_who_was_submitted_first_goes_first_however_late_it_was_put(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    early, late = row("early"), row("late")
    await ledger.put(late)
    await ledger.put(early)
    assert ids(await take()) == ["early", "late"]


async def test_a_lease_may_be_of_one_rung(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    low, high = row("low", priority=Priority.LOW), row("high", priority=Priority.HIGH)
    await put_all(ledger, [high, low, row("low of another type", of="write", priority=Priority.LOW)])
    leases = await ledger.lease("research", 9, until=100.0, priority=Priority.LOW)
    assert ids(list(leases)) == ["low"]
    assert list(await ledger.lease("research", 9, until=100.0, priority=Priority.LOW)) == []
    assert ids(await take()) == ["high"]


async def test_many_put_at_once_stand_in_the_order_of_the_calls(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    rows = [row() for _ in range(1_100)]  # more than goes into one statement, or one transaction
    await put_all(ledger, rows)
    assert ids(await take()) == [task.task_id for task in rows]


async def test_a_lease_is_of_one_type_and_no_larger_than_asked(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row("a"), row("b", of="write"), row("c")])
    assert ids(await take(1)) == ["a"]
    assert ids(await take(5)) == ["c"]
    assert ids(await take(5, of="write")) == ["b"]


@pytest.mark.parametrize("limit", [0, -1])
async def test_no_seats_no_leases(ledger: TaskStore, row: MakeRecord, take: Take, limit: int) -> None:
    await ledger.put(row())
    assert await take(limit) == []


async def test_a_lease_carries_the_row_its_end_and_a_fence_of_its_own(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    rows = [row("a", deadline=5.0, key="k"), row("b")]
    await put_all(ledger, rows)
    leases = await take(until=77.0)
    assert [lease.record for lease in leases] == rows
    assert [lease.until for lease in leases] == [77.0, 77.0]
    assert len({lease.fence for lease in leases}) == 2


async def test_nobody_leases_what_another_holds(ledger: TaskStore, row: MakeRecord) -> None:
    await put_all(ledger, [row() for _ in range(100)])
    lots = await asyncio.gather(*(ledger.lease("research", 3, until=100.0) for _ in range(40)))
    leased = [lease.record.task_id for lot in lots for lease in lot]
    assert len(leased) == len(set(leased)) == 100


async def test_a_cancelled_lease_keeps_nothing(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row("a"), row("b")])
    for turns in range(4):  # before it has begun, under way, as it ends
        leasing = asyncio.ensure_future(ledger.lease("research", 2, until=100.0))
        for _ in range(turns):
            await asyncio.sleep(0)
        if leasing.cancel():
            with pytest.raises(asyncio.CancelledError):
                await leasing
            await ledger.find("a")  # what it leased after all is on its way back
        else:
            await ledger.release(leasing.result())
        leases = await take()
        assert ids(leases) == ["a", "b"]
        await ledger.release(leases)


async def test_a_cancelled_put_does_not_hurt_its_neighbours(ledger: TaskStore, row: MakeRecord) -> None:
    puts = [asyncio.ensure_future(ledger.put(row(f"{number}"))) for number in range(10)]
    await asyncio.sleep(0)
    puts[4].cancel()
    outcomes = await asyncio.gather(*puts, return_exceptions=True)
    stored = [outcome for outcome in outcomes if outcome is PutResult.STORED]
    assert len(stored) >= 9
    assert await state(ledger, "9") is RecordState.WAITING


# --- holding ---------------------------------------------------------------------------------------------------------


async def test_a_start_counts(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lease,) = await take()
    assert lease.record.attempts == 0
    assert await ledger.begin_attempt(lease)
    await ledger.release([lease])
    (again,) = await take()
    assert again.record.attempts == 1


async def test_one_lease_started_twice_at_once_counts_twice(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lease,) = await take()
    assert all(await asyncio.gather(ledger.begin_attempt(lease), ledger.begin_attempt(lease)))
    await ledger.release([lease])
    assert [lease.record.attempts for lease in await take()] == [2]


async def test_a_lost_lease_may_do_nothing(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lost,) = await take()
    await ledger.release([lost])
    (held,) = await take()
    assert lost.fence != held.fence
    assert not await ledger.begin_attempt(lost)
    assert list(await renew(ledger, [lost, held], until=200.0)) == [lost]
    await ledger.release([lost])
    assert not await ledger.finish("a", DONE, fence=lost.fence)
    assert await state(ledger, "a") is RecordState.LEASED
    assert await ledger.begin_attempt(held)


async def test_a_fence_of_another_row_opens_nothing(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row("a"), row("b")])
    a, b = await take()
    crossed = Lease(record=a.record, fence=b.fence, until=100.0)
    assert not await ledger.begin_attempt(crossed)
    assert list(await renew(ledger, [crossed], until=200.0)) == [crossed]
    assert not await ledger.finish("a", DONE, fence=b.fence)


async def test_among_many_leases_the_lost_ones_are_told(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row() for _ in range(300)])
    leases = await take()
    lost = leases[7::100]
    await ledger.release(lost)
    assert list(await renew(ledger, leases, until=200.0)) == lost
    started = await asyncio.gather(*(ledger.begin_attempt(lease) for lease in leases))
    assert [lease for lease, done in zip(leases, started, strict=True) if not done] == lost


async def test_released_rows_stand_where_they_stood(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row("a"), row("b"), row("c", deadline=10.0)])
    leases = await take(2)
    await ledger.put(row("d"))
    await ledger.release(leases)
    assert ids(await take()) == ["c", "a", "b", "d"]


async def test_nothing_to_renew_or_release_is_no_mistake(ledger: TaskStore) -> None:
    assert list(await renew(ledger, [], until=200.0)) == []
    await ledger.release([])


# --- ending ----------------------------------------------------------------------------------------------------------


async def test_a_finished_row_keeps_its_completion_and_drops_its_envelope(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    await ledger.put(row("a", key="k"))
    (lease,) = await take()
    await ledger.begin_attempt(lease)
    assert await ledger.finish("a", DONE, fence=lease.fence)
    found = await ledger.find("a")
    assert found is not None
    assert found[0] is RecordState.DONE
    assert (found[1].task_id, found[1].key, found[1].attempts, found[1].envelope) == ("a", "k", 1, b"")
    assert found[2] == DONE


async def test_it_ends_once(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lease,) = await take()
    assert await ledger.finish("a", DONE, fence=lease.fence)
    assert not await ledger.finish("a", DONE, fence=lease.fence)
    assert not await ledger.finish("a", DONE, fence=None)
    assert not await ledger.begin_attempt(lease)
    assert list(await renew(ledger, [lease], until=200.0)) == [lease]
    await ledger.release([lease])
    assert await state(ledger, "a") is RecordState.DONE
    assert await take() == []


async def test_without_a_fence_only_a_waiting_row_ends(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row("held"), row("waiting")])
    await take(1)
    assert not await ledger.finish("held", DONE, fence=None)
    assert await ledger.finish("waiting", DONE, fence=None)
    assert not await ledger.finish("unknown", DONE, fence=None)
    assert await take() == []


async def test_a_waiting_row_does_not_end_by_a_fence(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.put(row("a"))
    assert not await ledger.finish("a", DONE, fence="mine")
    assert await state(ledger, "a") is RecordState.WAITING


async def test_id_and_key_stay_taken_while_the_result_is_kept(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.put(row("a", key="k"))
    await ledger.finish("a", DONE, fence=None)
    assert await ledger.put(row("a")) is PutResult.DUPLICATE
    assert await ledger.put(row("b", key="k")) is PutResult.DUPLICATE
    assert await ledger.prune(before=DONE.finished_at + 1) == 1
    assert await ledger.find("a") is None
    assert await ledger.find_key("k") is None
    assert await ledger.put(row("a", key="k")) is PutResult.STORED


async def test_pruning_takes_what_ended_before_and_nothing_else(ledger: TaskStore, row: MakeRecord) -> None:
    await put_all(ledger, [row("old"), row("recent"), row("waiting")])
    await ledger.finish("old", DONE, fence=None)
    await ledger.finish("recent", Completion(status="failed", finished_at=60.0), fence=None)
    assert await ledger.prune(before=60.0) == 1
    assert await state(ledger, "old") is None
    assert await state(ledger, "recent") is RecordState.DONE
    assert await state(ledger, "waiting") is RecordState.WAITING


async def test_of_ended_rows_the_oldest_go_first_when_there_are_too_many(another: OpenStore, row: MakeRecord) -> None:
    ledger = await another(bound=2)
    for finished_at in (3.0, 1.0, 2.0):
        task_id = f"ended at {finished_at}"
        await ledger.put(row(task_id, key=task_id))
        await ledger.finish(task_id, Completion(status="succeeded", finished_at=finished_at), fence=None)
    assert await state(ledger, "ended at 1.0") is None
    assert await ledger.find_key("ended at 1.0") is None
    assert await state(ledger, "ended at 2.0") is RecordState.DONE
    assert await state(ledger, "ended at 3.0") is RecordState.DONE


# --- lapsing ---------------------------------------------------------------------------------------------------------


async def test_a_lapsed_row_goes_back_to_its_place(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row("a"), row("b")])
    (lease,) = await take(1, until=10.0)
    await ledger.begin_attempt(lease)
    assert list(await ledger.reap(now=10.0, max_attempts=3)) == []
    assert await state(ledger, "a") is RecordState.LEASED  # until 10 means 10, too
    assert list(await ledger.reap(now=10.1, max_attempts=3)) == []
    assert not await ledger.finish("a", DONE, fence=lease.fence)
    leases = await take()
    assert ids(leases) == ["a", "b"]
    assert leases[0].record.attempts == 1


async def test_a_row_started_too_often_dies(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a", key="k", envelope=b"for the post-mortem"))
    for _ in range(2):
        (lease,) = await take(until=10.0)
        await ledger.begin_attempt(lease)
        dead = await ledger.reap(now=11.0, max_attempts=2)
    rows = [each.record for each in dead]
    assert [(task.task_id, task.attempts, task.envelope) for task in rows] == [("a", 2, b"for the post-mortem")]
    assert await take() == []
    found = await ledger.find("a")
    assert found is not None
    assert found[0] is RecordState.DEAD
    assert found[1:] == (dead[0].record, dead[0].completion)
    completion = found[2]
    assert completion is not None
    assert (completion.status, completion.attempts, completion.finished_at) == ("failed", 2, 11.0)
    assert completion.error is not None


async def test_a_dead_row_keeps_its_key_until_it_is_dropped(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a", key="k"))
    (lease,) = await take(until=10.0)
    await ledger.begin_attempt(lease)
    await ledger.reap(now=11.0, max_attempts=1)
    assert await ledger.put(row("b", key="k")) is PutResult.DUPLICATE
    assert await ledger.prune(before=12.0) == 0
    assert await ledger.delete_dead("a")
    assert await ledger.put(row("b", key="k")) is PutResult.STORED


async def test_a_lease_that_lapses_unstarted_costs_no_attempt(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    for _ in range(5):
        await take(until=10.0)
        assert list(await ledger.reap(now=11.0, max_attempts=1)) == []
    assert [lease.record.attempts for lease in await take()] == [0]


async def test_a_renewed_lease_does_not_lapse(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lease,) = await take(until=10.0)
    await renew(ledger, [lease], until=20.0)
    await ledger.reap(now=15.0, max_attempts=3)
    assert await state(ledger, "a") is RecordState.LEASED
    await ledger.reap(now=21.0, max_attempts=3)
    assert await state(ledger, "a") is RecordState.WAITING


async def test_renewing_makes_no_lease_shorter(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lease,) = await take(until=20.0)
    await renew(ledger, [lease], until=5.0)
    await ledger.reap(now=10.0, max_attempts=3)
    assert await state(ledger, "a") is RecordState.LEASED


@pytest.mark.blocks  # as a handler may
async def test_leases_are_renewed_also_while_the_loop_stands_still(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    await put_all(ledger, [row(), row()])
    leases = await take(until=10.0)
    with ThreadPoolExecutor(1) as thread:
        assert list(thread.submit(ledger.renew, leases, until=20.0).result(timeout=10.0)) == []
    await ledger.reap(now=15.0, max_attempts=3)
    assert await ledger.depths() == {}


async def test_a_row_put_leased_lapses_like_any_other(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"), fence="gone with its process", until=10.0)
    await ledger.reap(now=11.0, max_attempts=3)
    assert ids(await take()) == ["a"]


async def test_thousands_lapse_and_are_pruned_as_a_few_do(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await put_all(ledger, [row() for _ in range(1_200)])
    leases = await take(until=10.0)
    await asyncio.gather(*(ledger.begin_attempt(lease) for lease in leases[::2]))
    assert len(await ledger.reap(now=11.0, max_attempts=1)) == 600
    assert await ledger.depths() == {("research", Priority.NORMAL): 600}
    leases = await take()
    await asyncio.gather(*(ledger.finish(lease.record.task_id, DONE, fence=lease.fence) for lease in leases))
    assert await ledger.prune(before=DONE.finished_at + 1.0) == 600


# --- the dead ---------------------------------------------------------------------------------------------------------

UNREADABLE = Completion(status="failed", error="it cannot be read", finished_at=60.0)


async def bury(ledger: TaskStore, take: Take, *finished_at: float) -> None:
    """Let the rows that wait die one after the other."""
    for at in finished_at:
        (lease,) = await take(1)
        assert await ledger.mark_dead(lease, msgspec.structs.replace(UNREADABLE, finished_at=at))


async def test_what_nobody_can_run_is_buried_whole(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a", envelope=b"damaged"))
    (lease,) = await take()
    assert await ledger.mark_dead(lease, UNREADABLE)
    assert await take() == []
    assert await ledger.find("a") == (RecordState.DEAD, lease.record, UNREADABLE)


async def test_only_its_holder_may_bury_a_row(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    (lost,) = await take()
    await ledger.release([lost])
    assert not await ledger.mark_dead(lost, UNREADABLE)
    assert await state(ledger, "a") is RecordState.WAITING


async def test_the_dead_are_listed_by_pages_without_their_envelopes(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    await put_all(ledger, [row(f"dead {number}") for number in range(5)])
    await bury(ledger, take, 5.0, 4.0, 4.0, 2.0, 1.0)
    await ledger.put(row("alive"))
    first = await ledger.list_dead(3)
    assert [(dead.record.task_id, dead.completion.finished_at) for dead in first] == [
        ("dead 4", 1.0),
        ("dead 3", 2.0),
        ("dead 1", 4.0),
    ]
    assert {dead.record.envelope for dead in first} == {b""}
    assert first[0].completion.error == "it cannot be read"
    await ledger.delete_dead("dead 1")  # where the page ended
    second = await ledger.list_dead(3, after=(4.0, "dead 1"))
    assert [dead.record.task_id for dead in second] == ["dead 2", "dead 0"]
    assert list(await ledger.list_dead(3, after=(5.0, "dead 0"))) == []
    assert list(await ledger.list_dead(0)) == []


async def test_a_requeued_row_stands_where_it_stood_and_may_be_tried_as_often_as_a_new_one(
    ledger: TaskStore, row: MakeRecord, take: Take
) -> None:
    await put_all(ledger, [row("a", envelope=b"whole"), row("b")])
    (lease,) = await take(1, until=10.0)
    await ledger.begin_attempt(lease)
    await ledger.reap(now=11.0, max_attempts=1)
    assert await ledger.requeue("a") is PutResult.STORED
    assert list(await ledger.list_dead(9)) == []
    assert await ledger.depths() == {("research", Priority.NORMAL): 2}
    again, _ = await take()
    assert (again.record.task_id, again.record.attempts, again.record.envelope) == ("a", 0, b"whole")


async def test_a_full_ledger_takes_no_dead_row_back(another: OpenStore, row: MakeRecord) -> None:
    ledger = await another(bound=1)
    await ledger.put(row("a"))
    (lease,) = await ledger.lease("research", 1, until=10.0)
    await ledger.mark_dead(lease, UNREADABLE)
    await ledger.put(row("b"))
    assert await ledger.requeue("a") is PutResult.FULL
    assert await state(ledger, "a") is RecordState.DEAD
    await ledger.finish("b", DONE, fence=None)
    assert await ledger.requeue("a") is PutResult.STORED
    assert await ledger.put(row("c")) is PutResult.FULL


@pytest.mark.parametrize("task_id", ["waiting", "held", "done", "unknown"])
async def test_only_the_dead_are_requeued_or_dropped(
    ledger: TaskStore, row: MakeRecord, take: Take, task_id: str
) -> None:
    await put_all(ledger, [row("held"), row("waiting"), row("done")])
    await take(1)
    await ledger.finish("done", DONE, fence=None)
    before = await ledger.find(task_id)
    assert await ledger.requeue(task_id) is None
    assert not await ledger.delete_dead(task_id)
    assert await ledger.find(task_id) == before


async def test_a_dropped_row_is_gone_and_its_id_free(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    await ledger.put(row("a"))
    await bury(ledger, take, 5.0)
    assert await ledger.delete_dead("a")
    assert not await ledger.delete_dead("a")
    assert await ledger.find("a") is None
    assert await ledger.put(row("a")) is PutResult.STORED


async def test_results_do_not_crowd_out_the_dead_but_younger_dead_do(another: OpenStore, row: MakeRecord) -> None:
    ledger = await another(bound=2)

    async def take(limit: int) -> list[Lease]:
        return list(await ledger.lease("research", limit, until=100.0))

    for number in range(5):
        await ledger.put(row(f"dead {number}"))
        await bury(ledger, take, float(number))
        for _ in range(3):
            await ledger.put(row(done := f"done {number}"))
            await ledger.finish(done, DONE, fence=None)
    assert [dead.record.task_id for dead in await ledger.list_dead(9)] == ["dead 3", "dead 4"]
    assert await state(ledger, "dead 0") is None
    assert await state(ledger, "done 4") is RecordState.DONE


# --- counting --------------------------------------------------------------------------------------------------------


async def test_depths_are_what_waits_by_type_and_priority(ledger: TaskStore, row: MakeRecord, take: Take) -> None:
    assert await ledger.depths() == {}
    await put_all(ledger, [row("a"), row("b"), row("c", of="write", priority=Priority.LOW)])
    await ledger.put(row("held"), fence="mine", until=10.0)
    assert await ledger.depths() == {("research", Priority.NORMAL): 2, ("write", Priority.LOW): 1}
    leases = await take()
    assert await ledger.depths() == {("write", Priority.LOW): 1}
    await ledger.release(leases[:1])
    assert await ledger.depths() == {("research", Priority.NORMAL): 1, ("write", Priority.LOW): 1}
    await ledger.finish("c", DONE, fence=None)
    await ledger.finish("b", DONE, fence=leases[1].fence)
    await ledger.reap(now=11.0, max_attempts=1)
    assert await ledger.depths() == {("research", Priority.NORMAL): 2}
    await ledger.prune(before=1e6)
    assert await ledger.depths() == {("research", Priority.NORMAL): 2}


# --- opening and closing ---------------------------------------------------------------------------------------------


async def test_it_says_whether_it_is_durable(ledger: TaskStore, backend: StoreBackend) -> None:
    assert ledger.durable is ("durable" in backend.can)


async def test_open_and_close_may_be_repeated(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.open()
    await ledger.put(row())
    await ledger.close()
    await ledger.close()


async def test_closed_it_says_so(ledger: TaskStore, row: MakeRecord) -> None:
    await ledger.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await ledger.put(row())
    with pytest.raises(StoreUnavailable, match="not open"):
        await ledger.lease("research", 1, until=1.0)
    with pytest.raises(StoreUnavailable, match="not open"):
        await ledger.find("a")
    with pytest.raises(StoreUnavailable, match="not open"):
        ledger.renew([], until=1.0)


async def test_closing_finishes_what_was_asked_for(ledger: TaskStore, row: MakeRecord) -> None:
    puts = [asyncio.ensure_future(ledger.put(row())) for _ in range(10)]
    await asyncio.sleep(0)
    await asyncio.gather(ledger.close(), ledger.close())
    assert await asyncio.gather(*puts) == [PutResult.STORED] * 10


async def test_opened_again_it_has_all_as_it_was(
    ledger: TaskStore, backend: StoreBackend, another: OpenStore, row: MakeRecord, take: Take
) -> None:
    backend.needs("durable")
    await put_all(ledger, [row("held", priority=Priority.HIGH), row("a"), row("b"), row("done", key="k")])
    (held,) = await take(1)
    await ledger.begin_attempt(held)
    await ledger.finish("done", DONE, fence=None)
    await ledger.close()

    again = await another()
    assert ids(list(await again.lease("research", 9, until=100.0))) == ["a", "b"]
    assert await again.find_key("k") == "done"
    found = await again.find("done")
    assert found is not None
    assert found[2] == DONE
    assert await again.finish("held", DONE, fence=held.fence)


async def test_two_may_have_it_open_and_agree(
    ledger: TaskStore, backend: StoreBackend, another: OpenStore, row: MakeRecord
) -> None:
    backend.needs("shared")
    other = await another()
    await put_all(ledger, [row() for _ in range(50)])
    await put_all(other, [row() for _ in range(50)])
    lots = await asyncio.gather(*(side.lease("research", 7, until=100.0) for side in [ledger, other] * 10))
    leased = [lease for lot in lots for lease in lot]
    assert len({lease.record.task_id for lease in leased}) == len(leased) == 100
    assert list(await renew(other, leased, until=200.0)) == []
    await ledger.release(leased[:1])
    assert not await other.begin_attempt(leased[0])
    assert await ledger.depths() == await other.depths() == {("research", Priority.NORMAL): 1}
    assert await other.put(leased[0].record) is PutResult.DUPLICATE

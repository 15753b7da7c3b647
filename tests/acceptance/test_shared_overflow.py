"""Several processes on one overflow, and failures of it: nothing is lost, and nothing starts after its lease lapsed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, find_result, now, results, run_ready, virtual
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Overloaded, Task, TaskStatus, Verdict, clock
from forebay.interfaces import Lease, RecordState
from forebay.overflow import open_task_store

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the URL of a durable overflow."""
    return f"sqlite:///{tmp_path}/spill.db?fsync=no"


def unreliable_store(url: str, **trouble: Any) -> UnreliableStore:
    return UnreliableStore(open_task_store(url), StoreFaults(**trouble), AcknowledgedWrites(), clock.new_random(0))


def make_supervisor(agent: Any, overflow: Any, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=overflow, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


# --- by key, while the store has not answered ------------------------------------------------------------------------


@virtual
async def test_submitting_a_key_again_while_it_is_spilled_waits_for_the_answer() -> None:
    async def verdict() -> Verdict:
        return (await supervisor.submit(Task("work", key="k"))).verdict

    async with make_supervisor(
        Agent(), unreliable_store("memory://?bound=1", slow=0.1), max_queue_size=0
    ) as supervisor:
        await supervisor.submit(Task("work"))
        assert (await supervisor.submit(Task("work"))).verdict is Verdict.SPILLED
        assert set(await asyncio.gather(verdict(), verdict(), verdict())) == {Verdict.REJECTED}


@virtual
async def test_a_ticket_found_by_key_before_the_store_was_full_ends_rejected() -> None:
    async with make_supervisor(Agent(), "memory://?bound=1", max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work"))
        await supervisor.submit(Task("work"))
        first = asyncio.ensure_future(supervisor.submit(Task("work", key="k")))
        await asyncio.sleep(0)
        early = supervisor.submit_nowait(Task("work", key="k"))
        assert isinstance(await error_of(early), Overloaded)
        assert not await first


@virtual
async def test_a_ticket_found_by_key_ends_as_the_task_that_another_process_stored_under_it(file: str) -> None:
    store, overtaken = unreliable_store(file, slow=0.5), asyncio.Event()
    async with make_supervisor(Agent(), file) as other, make_supervisor(Agent(), store, lease=3.0) as here:

        async def find_and_be_overtaken(key: str) -> str | None:
            found = await find_key(key)
            await other.submit(Task("work", "theirs", key=key, durable=True))
            overtaken.set()
            return found

        find_key, store.find_key = store.find_key, find_and_be_overtaken  # type: ignore[method-assign]
        first = asyncio.ensure_future(here.submit(Task("work", "ours", key="k", durable=True)))
        await overtaken.wait()
        await run_ready()
        early = here.submit_nowait(Task("work", "ours", key="k"))
        assert (await early).result == "theirs"
        assert (await (await first)).result == "theirs"


# --- an end that cannot be stored -------------------------------------------------------------------------------------


@virtual
async def test_the_end_of_a_task_is_kept_until_the_store_is_back(file: str) -> None:
    agent = Agent(2.0)
    async with make_supervisor(agent, unreliable_store(file, outages=((1.0, 5.0),)), lease=9.0) as here:
        async with make_supervisor(agent, file, lease=9.0) as other:
            assert await here.run(Task("work", "once", task_id="kept", durable=True)) == "once"
            assert now() < 3.0  # who waits here need not wait for the store
            found = await find_result(other, "kept")
            assert (found.result, found.worker_id) == ("once", "worker")
            assert now() < 9.0  # before its lease would have lapsed
        assert agent.started == ["once"]


@virtual
async def test_a_task_that_failed_while_the_store_was_away_is_a_dead_letter_once_it_is_back(file: str) -> None:
    async def fail(_: Task) -> None:
        await asyncio.sleep(2.0)
        raise ValueError("wrong")

    async with make_supervisor(fail, unreliable_store(file, outages=((1.0, 5.0),)), lease=9.0) as here:
        result = await (await here.submit(Task("work", task_id="dead", durable=True)))
        assert result.status is TaskStatus.FAILED
        assert now() < 3.0
        await asyncio.sleep(5.0)
        assert [letter.task_id for letter in await here.dead_letters.page()] == ["dead"]
        await here.dead_letters.requeue("dead")  # so it is not known as one that has ended
        assert (await find_result(here, "dead")).status is TaskStatus.FAILED


@virtual
async def test_a_store_that_is_away_is_logged_in_few_lines(file: str, caplog: pytest.LogCaptureFixture) -> None:
    store = unreliable_store(file, outages=((1.0, 61.0),))
    async with make_supervisor(Agent(1.5), store, lease=9.0, max_queue_size=0) as here:
        tickets = [await here.submit(Task("work", number, durable=True)) for number in range(10)]
        for ticket in tickets:
            assert (await ticket).success
        failures = [record for record in caplog.records if "cannot be used" in record.getMessage()]
        assert 1 <= len(failures) <= 30  # of some hundred
        assert all(record.exc_info is None for record in caplog.records)


@virtual
async def test_closing_waits_for_a_store_that_comes_back_with_the_ends_that_it_lacks(file: str) -> None:
    agent = Agent(1.5)
    async with make_supervisor(agent, unreliable_store(file, outages=((1.0, 3.0),)), lease=9.0) as here:
        assert await here.run(Task("work", "once", task_id="kept", durable=True)) == "once"
    assert 3.0 <= now() <= 5.0
    store = open_task_store(file)
    await store.open()
    found = await store.find("kept")
    await store.close()
    assert found is not None
    assert found[0] is RecordState.DONE


@virtual
async def test_an_end_that_another_process_has_overtaken_is_not_stored(file: str) -> None:
    mine, theirs = Agent(2.0), Agent(0.5)
    async with make_supervisor(mine, unreliable_store(file, outages=((1.0, 30.0),)), lease=3.0) as here:
        async with make_supervisor(theirs, file, lease=3.0) as other:
            await here.run(Task("work", "twice", task_id="taken", durable=True))
            await asyncio.sleep(40.0)
            found = await find_result(other, "taken")
        assert (mine.started, theirs.started, found.attempts) == (["twice"], ["twice"], 2)


@virtual
async def test_closing_while_the_store_is_away_is_no_error(file: str) -> None:
    async with make_supervisor(Agent(60.0), unreliable_store(file, outages=((1.0, 90.0),)), lease=9.0) as supervisor:
        await supervisor.submit(Task("work", "once", task_id="left", durable=True))
        await asyncio.sleep(2.0)
        await supervisor.close()
        assert now() < 10.0
    agent = Agent()
    async with make_supervisor(agent, file, lease=9.0) as successor:  # once its lease has lapsed
        assert (await find_result(successor, "left")).result == "once"


@virtual
async def test_leases_that_nobody_could_renew_are_not_taken_back_at_once(file: str) -> None:
    """Even by a process that holds none, and so had nothing to renew."""
    away = ((2.5, 11.9),)  # for longer than a lease lasts
    mine, theirs = Agent(20.0), Agent(1.0)
    async with make_supervisor(theirs, unreliable_store(file, outages=away), lease=9.0):
        await asyncio.sleep(2.0)  # so that its turn is before the other's when the store is back
        async with make_supervisor(mine, unreliable_store(file, outages=away), lease=9.0) as here:
            assert await here.run(Task("work", "once", durable=True)) == "once"
    assert (mine.started, theirs.started) == (["once"], [])


# --- a slow store: its load climbs ------------------------------------------------------------------------------------


def load_of_overflow(supervisor: BackpressureSupervisor) -> float:
    [load] = [reading.load for reading in supervisor.readings() if reading.resource == "overflow"]
    return load


@virtual
async def test_the_load_of_a_slow_store_climbs_and_falls_again(file: str) -> None:
    store = unreliable_store(file)
    async with make_supervisor(Agent(100.0), store, lease=9.0, max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work"))
        assert load_of_overflow(supervisor) < 0.1
        store.slow_down(4.0)  # longer than a third of a lease
        submitting = asyncio.ensure_future(supervisor.submit(Task("work")))
        await asyncio.sleep(1.5)
        assert 0.45 < load_of_overflow(supervisor) < 0.55  # while it has not answered yet, too
        assert (await submitting).verdict is Verdict.SPILLED
        assert load_of_overflow(supervisor) > 1.0
        assert supervisor.statistics().limited_by == "overflow"
        store.repair()
        await asyncio.sleep(20.0)
        assert load_of_overflow(supervisor) < 0.1


@virtual
async def test_a_slow_store_gets_no_more_work_until_it_is_faster(file: str) -> None:
    store = unreliable_store(file)
    async with make_supervisor(Agent(100.0), store, lease=9.0, max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work"))
        store.slow_down(4.0)
        await supervisor.submit(Task("work"))
        since = now()
        ticket = await supervisor.submit(Task("work"))
        assert now() == approximately(since)  # nobody waits for it
        assert (ticket.verdict, ticket.limited_by) == (Verdict.REJECTED, "overflow")
        assert "and the overflow is slow" in str(ticket.reason)
        store.repair()
        await asyncio.sleep(10.0)
        assert (await supervisor.submit(Task("work"))).verdict is Verdict.SPILLED


@virtual
async def test_the_load_of_a_store_that_fails_is_full_and_nothing_else_is(file: str) -> None:
    store = unreliable_store(file, outages=((5.0, 10.0),))
    async with make_supervisor(Agent(1.0), store, lease=3.0) as supervisor:
        await asyncio.sleep(7.0)
        assert load_of_overflow(supervisor) == 1.0
        assert await supervisor.run(Task("work", "needs no store")) == "needs no store"
        await asyncio.sleep(5.0)
        assert load_of_overflow(supervisor) < 0.1


# --- a lease that lapsed ---------------------------------------------------------------------------------------------


@virtual
async def test_a_task_that_waits_for_its_thread_does_not_start_once_its_lease_has_lapsed(file: str) -> None:
    agent = Agent(10.0)
    async with (
        make_supervisor(agent, unreliable_store(file, outages=((1.0, 9.5),)), slots=2, lease=3.0) as here,
        make_supervisor(agent, file, lease=3.0),
    ):
        before = await here.submit(Task("work", "before", thread_id="t"))
        behind = await here.submit(Task("work", "behind", thread_id="t", durable=True))
        assert all(result.success for result in await results([before, behind]))
        assert agent.started == ["before", "behind"]
        assert here.statistics().started == 1


@virtual
async def test_a_lost_record_that_comes_back_while_its_task_runs_is_not_started_again(file: str) -> None:
    agent = Agent(30.0)
    async with make_supervisor(agent, unreliable_store(file, outages=((1.0, 12.0),)), slots=2, lease=3.0) as here:
        ticket = await here.submit(Task("work", "once", durable=True))
        other = open_task_store(file)
        await other.open()
        await asyncio.sleep(10.0)
        await other.reap(now=1e12, max_attempts=3)  # another process finds it lapsed, and ends before it takes it
        await other.close()
        assert (await ticket).success
        assert agent.started == ["once"]


@virtual
async def test_a_record_whose_answer_was_lost_belongs_to_the_task_submitted_again(file: str) -> None:
    agent = Agent()
    store = unreliable_store(file, loses_reply=1.0)
    store.repair()
    async with make_supervisor(agent, store, max_queue_size=0) as supervisor:
        running = await supervisor.submit(Task("work", "running"))
        store._faults = StoreFaults(loses_reply=1.0)
        assert not await supervisor.submit(Task("work", "again", task_id="a"))
        store.repair()
        await running
        ticket = supervisor.submit_nowait(Task("work", "again", task_id="a"))
        assert (await ticket).success
        await asyncio.sleep(60.0)
        assert agent.started == ["running", "again"]
        assert supervisor.statistics().outside == 0


@virtual
async def test_a_task_that_was_refilled_before_the_store_answered_is_spilled_whatever_the_answer(file: str) -> None:
    agent, store = Agent(), unreliable_store(file)
    async with make_supervisor(agent, store, max_queue_size=0) as supervisor:

        async def put_and_forget(*given: Any, **options: Any) -> Any:
            store.put = put  # type: ignore[method-assign]
            await put(*given, **options)
            await asyncio.sleep(1.5)  # meanwhile the slot becomes free
            raise store._fail("the answer was lost")

        await supervisor.submit(Task("work", "running"))
        put, store.put = store.put, put_and_forget  # type: ignore[method-assign]
        first = asyncio.ensure_future(supervisor.submit(Task("work", "unanswered")))
        await asyncio.sleep(0.1)
        second = await supervisor.submit(Task("work", "spilled"))
        ticket = await first
        assert ticket.verdict is Verdict.SPILLED
        assert all(result.success for result in await results([ticket, second]))
        assert agent.started == ["running", "unanswered", "spilled"]


# --- writes that fail ------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_whose_end_could_not_be_stored_is_not_run_again_by_the_same_process(file: str) -> None:
    agent = Agent(5.0)
    async with make_supervisor(agent, unreliable_store(file, outages=((4.0, 8.0),)), lease=6.0) as supervisor:
        ticket = await supervisor.submit(Task("work", "once", task_id="a", durable=True))
        assert (await ticket).success
        await asyncio.sleep(60.0)
        assert agent.started == ["once"]
        assert supervisor.statistics().succeeded == 1
    async with make_supervisor(agent, file) as later:
        assert (await find_result(later, "a")).status is TaskStatus.SUCCEEDED


@virtual
async def test_a_task_that_cannot_be_stored_when_draining_runs_to_its_end(file: str) -> None:
    agent = Agent(1.0)
    async with make_supervisor(agent, unreliable_store(file, outages=((0.5, 100.0),))) as supervisor:
        tickets = [await supervisor.submit(Task("work", number)) for number in range(3)]
        await asyncio.sleep(0.6)
        await supervisor.drain()
        assert [ticket.status for ticket in tickets] == [TaskStatus.SUCCEEDED] * 3


@virtual
async def test_a_listener_to_a_task_that_another_process_runs_gets_its_end(file: str) -> None:
    agent = Agent(1.0)
    async with (
        make_supervisor(agent, file, max_queue_size=0, lease=3.0) as here,
        make_supervisor(agent, file, lease=3.0),
    ):
        await here.submit(Task("work", timeout=50.0))
        agent.seconds = 40.0
        spilled = await here.submit(Task("work"))
        assert spilled.verdict is Verdict.SPILLED
        kinds = [event.kind async for event in spilled.events()]
        assert kinds[-1] == "finished"


@virtual
async def test_a_start_that_was_slow_to_record_does_not_delay_the_timeouts_of_others(file: str) -> None:
    store = unreliable_store(file)

    async def start_late(lease: Lease) -> bool:
        await asyncio.sleep(8.0)
        return await start(lease)

    start, store.begin_attempt = store.begin_attempt, start_late  # type: ignore[method-assign]
    supervisor = BackpressureSupervisor(overflow=store)
    supervisor.register_worker("worker", handler=Agent(100.0), task_types=["work"], max_concurrent=2, timeout=10.0)
    async with supervisor:
        await supervisor.submit(Task("work", durable=True))
        other, started = await supervisor.submit(Task("work")), now()
        assert (await other).status is TaskStatus.TIMED_OUT
        assert now() - started == approximately(10.0)

"""Several processes on one overflow, and one in trouble: nothing is lost, nothing starts on a right that lapsed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, now, results, run_ready, virtual
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Overloaded, Task, TaskStatus, Verdict, clock
from forebay.interfaces import Lease
from forebay.overflow import open_task_store

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The URL of an overflow that survives."""
    return f"sqlite:///{tmp_path}/spill.db?synchronous=off"


def troubled(url: str, **trouble: Any) -> UnreliableStore:
    return UnreliableStore(open_task_store(url), StoreFaults(**trouble), AcknowledgedWrites(), clock.new_random(0))


def house(agent: Any, overflow: Any, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=overflow, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


# --- by key, while the store has not answered ------------------------------------------------------------------------


@virtual
async def test_whoever_repeats_a_key_while_its_spill_is_pending_waits_for_the_answer() -> None:
    async def verdict() -> Verdict:
        return (await supervisor.submit(Task("work", key="k"))).verdict

    async with house(Agent(), troubled("memory://?bound=1", slow=0.1), max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work"))
        assert (await supervisor.submit(Task("work"))).verdict is Verdict.SPILLED
        assert set(await asyncio.gather(verdict(), verdict(), verdict())) == {Verdict.REJECTED}


@virtual
async def test_a_ticket_got_by_key_before_its_spill_was_refused_answers_who_awaits_it() -> None:
    async with house(Agent(), "memory://?bound=1", max_queue_size=0) as supervisor:
        await supervisor.submit(Task("work"))
        await supervisor.submit(Task("work"))
        first = asyncio.ensure_future(supervisor.submit(Task("work", key="k")))
        await asyncio.sleep(0)
        early = supervisor.submit_nowait(Task("work", key="k"))
        assert isinstance(await error_of(early), Overloaded)
        assert not await first


@virtual
async def test_a_ticket_got_by_key_ends_as_the_work_that_another_process_has_stored_under_it(file: str) -> None:
    ledger, overtaken = troubled(file, slow=0.5), asyncio.Event()
    async with house(Agent(), file) as other, house(Agent(), ledger, lease=3.0) as here:

        async def find_and_be_overtaken(key: str) -> str | None:
            found = await find_key(key)
            await other.submit(Task("work", "theirs", key=key, durable=True))
            overtaken.set()
            return found

        find_key, ledger.find_key = ledger.find_key, find_and_be_overtaken  # type: ignore[method-assign]
        first = asyncio.ensure_future(here.submit(Task("work", "ours", key="k", durable=True)))
        await overtaken.wait()
        await run_ready()
        early = here.submit_nowait(Task("work", "ours", key="k"))
        assert (await early).result == "theirs"
        assert (await (await first)).result == "theirs"


# --- a right that lapsed ---------------------------------------------------------------------------------------------


@virtual
async def test_a_task_behind_its_thread_does_not_start_once_its_lease_has_lapsed(file: str) -> None:
    agent = Agent(10.0)
    async with (
        house(agent, troubled(file, outages=((1.0, 9.5),)), slots=2, lease=3.0) as here,
        house(agent, file, lease=3.0),
    ):
        before = await here.submit(Task("work", "before", thread_id="t"))
        behind = await here.submit(Task("work", "behind", thread_id="t", durable=True))
        assert all(result.success for result in await results([before, behind]))
        assert agent.started == ["before", "behind"]
        assert here.statistics().started == 1


@virtual
async def test_a_lost_row_that_comes_back_while_its_task_still_runs_is_not_begun_again(file: str) -> None:
    agent = Agent(30.0)
    async with house(agent, troubled(file, outages=((1.0, 12.0),)), slots=2, lease=3.0) as here:
        ticket = await here.submit(Task("work", "once", durable=True))
        other = open_task_store(file)
        await other.open()
        await asyncio.sleep(10.0)
        await other.reap(now=1e12, max_attempts=3)  # another process finds it lapsed, and ends before it takes it
        await other.close()
        assert (await ticket).success
        assert agent.started == ["once"]


@virtual
async def test_a_row_whose_answer_was_lost_is_taken_for_the_task_that_was_submitted_again(file: str) -> None:
    agent = Agent()
    ledger = troubled(file, loses_reply=1.0)
    ledger.repair()
    async with house(agent, ledger, max_queue_size=0) as supervisor:
        running = await supervisor.submit(Task("work", "running"))
        ledger._faults = StoreFaults(loses_reply=1.0)
        assert not await supervisor.submit(Task("work", "again", task_id="a"))
        ledger.repair()
        await running
        ticket = supervisor.submit_nowait(Task("work", "again", task_id="a"))
        assert (await ticket).success
        await asyncio.sleep(60.0)
        assert agent.started == ["running", "again"]
        assert supervisor.statistics().outside == 0


@virtual
async def test_a_task_that_was_pulled_in_before_the_store_answered_is_spilled_whatever_the_answer(file: str) -> None:
    agent, ledger = Agent(), troubled(file)
    async with house(agent, ledger, max_queue_size=0) as supervisor:

        async def put_and_forget(*given: Any, **options: Any) -> Any:
            ledger.put = put  # type: ignore[method-assign]
            await put(*given, **options)
            await asyncio.sleep(1.5)  # meanwhile the slot falls free
            raise ledger._fail("the answer was lost")

        await supervisor.submit(Task("work", "running"))
        put, ledger.put = ledger.put, put_and_forget  # type: ignore[method-assign]
        first = asyncio.ensure_future(supervisor.submit(Task("work", "unanswered")))
        await asyncio.sleep(0.1)
        second = await supervisor.submit(Task("work", "spilled"))
        ticket = await first
        assert ticket.verdict is Verdict.SPILLED
        assert all(result.success for result in await results([ticket, second]))
        assert agent.started == ["running", "unanswered", "spilled"]


# --- what the store could not be told --------------------------------------------------------------------------------


@virtual
async def test_a_task_whose_end_could_not_be_stored_is_not_run_again_by_who_ran_it(file: str) -> None:
    agent = Agent(5.0)
    async with house(agent, troubled(file, outages=((4.0, 8.0),)), lease=6.0) as supervisor:
        ticket = await supervisor.submit(Task("work", "once", task_id="a", durable=True))
        assert (await ticket).success
        await asyncio.sleep(60.0)
        assert agent.started == ["once"]
        assert supervisor.statistics().succeeded == 1
    async with house(agent, file) as later:
        assert (await later.ticket("a")).status is TaskStatus.SUCCEEDED


@virtual
async def test_what_cannot_be_stored_as_the_house_drains_runs_to_its_end_inside(file: str) -> None:
    agent = Agent(1.0)
    async with house(agent, troubled(file, outages=((0.5, 100.0),))) as supervisor:
        tickets = [await supervisor.submit(Task("work", number)) for number in range(3)]
        await asyncio.sleep(0.6)
        await supervisor.drain()
        assert [ticket.status for ticket in tickets] == [TaskStatus.SUCCEEDED] * 3


@virtual
async def test_who_listens_to_a_task_that_another_process_runs_hears_its_end(file: str) -> None:
    agent = Agent(1.0)
    async with house(agent, file, max_queue_size=0, lease=3.0) as here, house(agent, file, lease=3.0):
        await here.submit(Task("work", timeout=50.0))
        agent.seconds = 40.0
        spilled = await here.submit(Task("work"))
        assert spilled.verdict is Verdict.SPILLED
        kinds = [event.kind async for event in spilled.events()]
        assert kinds[-1] == "finished"


@virtual
async def test_a_stored_task_whose_start_was_slow_to_record_does_not_hold_up_the_timeouts_of_others(file: str) -> None:
    ledger = troubled(file)

    async def start_late(lease: Lease) -> bool:
        await asyncio.sleep(8.0)
        return await start(lease)

    start, ledger.begin_attempt = ledger.begin_attempt, start_late  # type: ignore[method-assign]
    supervisor = BackpressureSupervisor(overflow=ledger)
    supervisor.register_worker("worker", handler=Agent(100.0), task_types=["work"], max_concurrent=2, timeout=10.0)
    async with supervisor:
        await supervisor.submit(Task("work", durable=True))
        other, began = await supervisor.submit(Task("work")), now()
        assert (await other).status is TaskStatus.TIMED_OUT
        assert now() - began == approximately(10.0)

"""Producers that wait for room: `submit(task, wait=seconds)` slows them down instead of rejecting their tasks."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, now, rejected, run_ready, submit_all, virtual

from forebay import BackpressureSupervisor, Deadline, Overloaded, Priority, Task, TaskStatus, Verdict
from forebay.errors import InvalidSetting, SupervisorClosed, UnknownTaskType
from forebay.interfaces import PutResult, TaskRecord
from forebay.overflow.sqlite import SqliteTaskStore
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time the thread of SQLite is the loop's own


def small(agent: Any, **settings: Any) -> BackpressureSupervisor:
    """Return a supervisor with one slot and room for one waiting task."""
    supervisor = BackpressureSupervisor(max_queue_size=1, backpressure_threshold=1.0, **settings)
    supervisor.register_worker("worker", handler=agent, task_types=["work"])
    return supervisor


@virtual
async def test_a_producer_that_waits_is_slowed_down_to_the_pace_of_the_worker() -> None:
    async with small(Agent(1.0)) as supervisor:
        for number in range(10):
            assert await supervisor.submit(Task("work", number), wait=math.inf)
        assert now() == approximately(8.0)  # the last but one has begun, and the last one waits
        assert supervisor.statistics().rejected == 0
        assert supervisor.statistics().submitted == 10


@virtual
async def test_a_thousand_producers_are_admitted_in_the_order_in_which_they_came() -> None:
    agent = Agent(0.1)
    async with small(agent) as supervisor:
        tickets = await asyncio.gather(*(supervisor.submit(Task("work", n), wait=math.inf) for n in range(1000)))
        await asyncio.gather(*tickets)
    assert agent.started == list(range(1000))
    assert now() == approximately(100.0)


@virtual
async def test_better_priorities_stand_before_others_in_line() -> None:
    agent = Agent(1.0)
    async with small(agent) as supervisor:
        await submit_all(supervisor, [Task("work", "a"), Task("work", "b")])
        low = asyncio.create_task(supervisor.submit(Task("work", "low", priority=Priority.LOW), wait=60.0))
        await run_ready()
        high = asyncio.create_task(supervisor.submit(Task("work", "high", priority=Priority.HIGH), wait=60.0))
        assert await (await high).value() == "high"
        assert await (await low).value() == "low"
    assert agent.started == ["a", "b", "high", "low"]


@virtual
async def test_the_producers_of_one_tenant_do_not_stand_before_those_of_another() -> None:
    agent = Agent(1.0)
    async with small(agent) as supervisor:
        big = [asyncio.create_task(supervisor.submit(Task("work", "big", tenant="big"), wait=500.0)) for _ in range(50)]
        await run_ready()
        ticket = await supervisor.submit(Task("work", "small", tenant="small"), wait=500.0)
        await ticket
        assert agent.started.index("small") <= 2
        for submitting in big:
            await (await submitting)


@virtual
async def test_producers_of_many_tenants_are_all_admitted() -> None:
    agent = Agent(1.0)
    async with small(agent) as supervisor:
        tasks = [Task("work", number, tenant=f"tenant {number % 40}") for number in range(200)]
        tickets = await asyncio.gather(*(supervisor.submit(task, wait=math.inf) for task in tasks))
        await asyncio.gather(*tickets)
    assert now() == approximately(200.0)
    assert max(agent.started.index(number) for number in range(40)) < 120  # the first of each tenant


@virtual
async def test_after_its_time_a_producer_is_rejected_once_and_told_when_to_come_back() -> None:
    async with small(Agent(10.0)) as supervisor:
        record = EventRecord(supervisor)
        await submit_all(supervisor, [Task("work"), Task("work")])
        ticket = await supervisor.submit(Task("work", task_id="late"), wait=3.0)
        assert now() == approximately(3.0)
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.limited_by == "pool:work"
        assert supervisor.statistics().rejected == 1
        await run_ready()
        assert [event.verdict for event in record.for_task("late")] == [Verdict.REJECTED]  # type: ignore[attr-defined]


@virtual
async def test_run_waits_for_room_too() -> None:
    async with small(Agent(1.0)) as supervisor:
        values = await asyncio.gather(*(supervisor.run(Task("work", n), wait=10.0) for n in range(5)))
        assert values == list(range(5))
        with pytest.raises(Overloaded):
            await asyncio.gather(*(supervisor.run(Task("work", n), wait=0.5) for n in range(5)))


@virtual
async def test_a_deadline_ends_the_wait() -> None:
    async with small(Agent(10.0)) as supervisor:
        await submit_all(supervisor, [Task("work"), Task("work")])
        ticket = await supervisor.submit(Task("work", deadline=Deadline.within(2.0)), wait=60.0)
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.reason == "its deadline passed while it waited for room"
        assert now() == approximately(2.0)


@virtual
async def test_a_task_that_cannot_meet_its_deadline_does_not_wait_for_room() -> None:
    async with small(Agent(10.0)) as supervisor:
        for _ in range(20):
            await supervisor.run(Task("work"))
        at = now()
        ticket = await supervisor.submit(Task("work", deadline=Deadline.within(5.0)), wait=60.0)
        again = await supervisor.submit(Task("work", deadline=Deadline.within(5.0)), wait=60.0)
        assert TaskStatus.REJECTED in (ticket.status, again.status)  # one in ten seconds tests the estimate
        assert now() == at


@virtual
async def test_a_caller_that_leaves_the_line_lets_the_next_one_in() -> None:
    agent = Agent(1.0)
    async with small(agent) as supervisor:
        await submit_all(supervisor, [Task("work", "a"), Task("work", "b")])
        leaving = asyncio.create_task(supervisor.submit(Task("work", "leaving"), wait=60.0))
        await run_ready()
        staying = asyncio.create_task(supervisor.submit(Task("work", "staying"), wait=60.0))
        await run_ready()
        leaving.cancel()
        assert await (await staying).value() == "staying"
    assert agent.started == ["a", "b", "staying"]


@virtual
async def test_draining_ends_the_wait() -> None:
    async with small(Agent(5.0)) as supervisor:
        await submit_all(supervisor, [Task("work"), Task("work")])
        waiting = [asyncio.create_task(supervisor.submit(Task("work"), wait=math.inf)) for _ in range(3)]
        await run_ready()
        draining = asyncio.create_task(supervisor.drain())
        await asyncio.wait(waiting)
        assert now() == 0.0
        assert [type(each.exception()) for each in waiting] == [SupervisorClosed] * 3
        await draining


@virtual
async def test_agents_that_wait_for_room_lend_their_slots_to_the_tasks_that_make_it() -> None:
    async with small(lambda _: None) as supervisor:

        async def agent(task: Task) -> int:
            tickets = [
                await supervisor.submit(Task("agent", task.payload - 1), wait=math.inf) for _ in range(task.payload)
            ]
            below: list[int] = [await ticket.value() for ticket in tickets]
            return 1 + sum(below)

        supervisor.register_worker("agent", handler=agent, task_types=["agent"])
        async with asyncio.timeout(100.0):
            assert await supervisor.run(Task("agent", 5)) == 326


@virtual
async def test_an_agent_in_the_only_slot_has_room_at_once_for_a_task_of_its_own() -> None:
    supervisor = BackpressureSupervisor(max_queue_size=0)

    async def agent(task: Task) -> float:
        if task.payload:
            await supervisor.run(Task("agent", task.payload - 1), wait=60.0)
        return now()

    supervisor.register_worker("agent", handler=agent, task_types=["agent"], max_concurrent=1)
    async with supervisor:
        assert await supervisor.run(Task("agent", 3)) == approximately(0.0)


@virtual
async def test_with_an_overflow_tasks_are_spilled_and_wait_only_while_it_is_full(tmp_path: Path) -> None:
    async with small(Agent(1.0), overflow=f"sqlite:///{tmp_path}/spill.db?bound=2") as supervisor:
        tickets = [await supervisor.submit(Task("work", n), wait=60.0) for n in range(8)]
        assert {ticket.verdict for ticket in tickets} == {Verdict.ADMITTED, Verdict.SPILLED}
        assert [await ticket.value() for ticket in tickets] == list(range(8))
        assert supervisor.statistics().rejected == 0


@pytest.mark.parametrize("options", [{}, {"durable": True}], ids=str)
@virtual
async def test_whoever_waits_does_not_ask_the_overflow_all_the_time(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    puts = 0
    put = SqliteTaskStore.put

    async def counted_put(self: SqliteTaskStore, record: TaskRecord, **settings: Any) -> PutResult:
        nonlocal puts
        puts += 1
        return await put(self, record, **settings)

    monkeypatch.setattr(SqliteTaskStore, "put", counted_put)
    async with small(Agent(5.0), overflow=f"sqlite:///{tmp_path}/spill.db?bound=1") as supervisor:
        tickets = [await supervisor.submit(Task("work", n, spill=n > 1)) for n in range(3)]
        waiting = [asyncio.create_task(supervisor.submit(Task("work", n, **options), wait=60.0)) for n in range(3)]
        await asyncio.sleep(3.5)
        assert puts < 10  # one of the first, and one a second of whoever is the first in line
        await asyncio.gather(*tickets, *waiting)


@pytest.mark.parametrize("overflow", [None, "memory://?bound=2"])
@virtual
async def test_a_message_whose_conversation_is_full_lets_others_pass(overflow: str | None) -> None:
    supervisor = BackpressureSupervisor(max_queue_size=2, overflow=overflow)

    async def agent(task: Task) -> Any:
        if task.payload == "first":
            await asyncio.sleep(1.0)
            return await supervisor.run(Task("work", "nested"), wait=math.inf)
        return task.payload

    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=4)
    async with supervisor, asyncio.timeout(100.0):
        first = await supervisor.submit(Task("work", "first", thread_id="one"))
        messages = [supervisor.run(Task("work", number, thread_id="one"), wait=math.inf) for number in range(6)]
        waiting = [asyncio.create_task(message) for message in messages]
        await run_ready()
        if overflow is None:  # else others of its type wait for the overflow
            assert await supervisor.run(Task("work", "other"), wait=0.5) == "other"
        assert await first.value() == "nested"
        assert await asyncio.gather(*waiting) == list(range(6))


@virtual
async def test_a_failed_worker_that_comes_back_admits_who_waits() -> None:
    calls = 0

    async def flaky(_: Task) -> str:
        nonlocal calls
        calls += 1
        if calls <= 5:
            raise RuntimeError
        return "well"

    async with small(flaky) as supervisor:
        for _ in range(5):
            await (await supervisor.submit(Task("work")))
        assert rejected([await supervisor.submit(Task("work"))])
        assert await supervisor.run(Task("work"), wait=60.0) == "well"


@pytest.mark.parametrize("wait", [-1.0, "soon", math.nan, True])
@virtual
async def test_what_is_no_time_is_an_error(wait: Any) -> None:
    async with small(Agent()) as supervisor:
        with pytest.raises(
            InvalidSetting, match=r"submit was given wait=.*; it must be a number of seconds, at least 0"
        ):
            await supervisor.submit(Task("work"), wait=wait)
        with pytest.raises(UnknownTaskType):
            await supervisor.submit(Task("nothing"), wait=1.0)

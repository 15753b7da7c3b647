"""Many supervisors on one overflow: what one stores starts in another one soon, and they do not all ask at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tests.support.counting_store import ChannelStore, CountingStore
from tests.support.task_plane import Agent, find_result, now, virtual

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskStatus, Upstream, Verdict
from forebay.interfaces import TaskStore
from forebay.overflow import open_task_store

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

LEASE = 300.0  # a heartbeat every 100 s: what happens sooner does not wait for one


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the URL of a durable overflow."""
    return f"sqlite:///{tmp_path}/spill.db?fsync=no"


def make_supervisor(handler: Any, overflow: Any, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=overflow, lease=LEASE, **options)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=slots)
    return supervisor


@contextlib.asynccontextmanager
async def fleet(
    count: int, handler: Any, file: str, calls: Counter[str] | None = None, **options: Any
) -> AsyncIterator[list[BackpressureSupervisor]]:
    """Run `count` supervisors on one file."""
    async with contextlib.AsyncExitStack() as stack:
        supervisors = []
        for _ in range(count):
            store: Any = file if calls is None else CountingStore(open_task_store(file), calls)
            supervisors.append(
                await stack.enter_async_context(make_supervisor(handler, cast("TaskStore", store), **options))
            )
        await asyncio.sleep(1.0)
        yield supervisors


@contextlib.asynccontextmanager
async def submitter(file: str, **options: Any) -> AsyncIterator[BackpressureSupervisor]:
    """Run a supervisor whose tasks of the type "work" all wait in the overflow, and none comes back."""
    async with make_supervisor(Agent(), file, **options) as supervisor:
        supervisor.pause("work")
        yield supervisor


async def spill(supervisor: BackpressureSupervisor, *tasks: Task) -> list[Any]:
    """Submit tasks, all of which are spilled."""
    tickets = [await supervisor.submit(task) for task in tasks]
    assert {ticket.verdict for ticket in tickets} == {Verdict.SPILLED}
    return tickets


# --- soon -------------------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_starts_soon_in_an_idle_process(file: str) -> None:
    agent = Agent(seconds=0.0)
    async with submitter(file, max_queue_size=0) as here, fleet(1, agent, file):
        waits = []
        for number in range(20):
            await asyncio.sleep(3.0)
            since = now()
            (ticket,) = await spill(here, Task("work", number))
            await agent.wait_for_calls(number + 1)
            waits.append(now() - since)
            assert (await ticket).result == number
            assert now() - since < 0.2  # and its result is known here as soon
        assert sorted(waits)[10] < 0.05
        assert max(waits) < 0.1


@virtual
async def test_a_record_that_waits_for_nothing_but_a_slot_starts_when_one_is_free(file: str) -> None:
    """A busy process counts again when a slot becomes free, though it has known of no record."""
    agent = Agent(seconds=LEASE / 2)  # between two heartbeats, so that none of them counts
    async with submitter(file, max_queue_size=0) as here, make_supervisor(agent, file) as other:
        running = other.submit_nowait(Task("work", "running"))
        await asyncio.sleep(LEASE / 2 - 0.3)
        await spill(here, Task("work", "stored"))
        await running
        ended = now()
        await agent.wait_for_calls(2)
        assert now() - ended < 0.02


@virtual
async def test_a_better_task_of_another_process_goes_before_what_is_queued(file: str) -> None:
    agent = Agent(seconds=1.0)
    async with submitter(file, max_queue_size=0) as here, make_supervisor(agent, file) as other:
        queued = [other.submit_nowait(Task("work", number, priority=Priority.LOW)) for number in range(20)]
        await asyncio.sleep(2.1)
        await spill(here, Task("work", "urgent", priority=Priority.HIGH))
        await asyncio.gather(*queued)
    assert agent.started.index("urgent") <= 4


@virtual
async def test_tenants_of_another_process_take_their_turns(file: str) -> None:
    agent = Agent(seconds=1.0)
    async with submitter(file, max_queue_size=0) as here, fleet(2, agent, file):
        many = await spill(here, *(Task("work", f"many {number}", tenant="many") for number in range(20)))
        (few,) = await spill(here, Task("work", "few", tenant="few"))
        await few
        assert len(agent.finished) <= 6
        await asyncio.gather(*many)


@virtual
async def test_a_result_of_another_process_is_noticed_by_all_who_await_it(file: str) -> None:
    agent = Agent(seconds=5.0)
    async with submitter(file, max_queue_size=0) as here, submitter(file) as third, fleet(1, agent, file, slots=50):
        tickets = await spill(here, *(Task("work", number, task_id=f"{number}") for number in range(50)))
        found = [await third.find(f"{number}") for number in range(50)]
        started = now()
        await asyncio.gather(*tickets, *(ticket for ticket in found if ticket is not None))
        assert now() - started < 5.5


@virtual
async def test_a_result_is_noticed_though_nobody_awaited_it_when_another_process_ended_the_task(file: str) -> None:
    agent = Agent(seconds=1.0)
    async with submitter(file, max_queue_size=0) as here, fleet(1, agent, file):
        (ticket,) = await spill(here, Task("work"))
        await asyncio.sleep(10.0)
        assert agent.finished
        started = now()
        assert (await ticket).success
        assert now() - started < 0.1


@virtual
async def test_a_task_that_expires_in_the_overflow_is_not_run_by_whoever_takes_it(file: str) -> None:
    agent = Agent(seconds=0.0)
    async with submitter(file, max_queue_size=0) as here:
        await spill(here, Task("work", task_id="a", deadline=Deadline.within(5.0)), Task("work", task_id="b"))
    await asyncio.sleep(10.0)
    async with fleet(2, agent, file) as supervisors:
        for supervisor in supervisors:
            assert (await find_result(supervisor, "a")).status is TaskStatus.EXPIRED
            assert (await find_result(supervisor, "b")).success
    assert [task.task_id for task in agent.calls] == ["b"]


# --- not all at once --------------------------------------------------------------------------------------------------


async def calls_for_each_task(count: int, file: str) -> tuple[float, float]:
    """Return the seconds that many tasks take on `count` supervisors, and the calls of the store for each task."""
    calls, tasks = Counter[str](), 300
    async with submitter(file, max_queue_size=0) as here, fleet(count, Agent(seconds=0.1), file, calls, slots=2):
        calls.clear()
        started = now()
        tickets = await asyncio.gather(*(here.submit(Task("work")) for _ in range(tasks)))
        await asyncio.gather(*tickets)
        return now() - started, calls.total() / tasks


@virtual
async def test_ten_supervisors_are_ten_times_as_fast_with_as_many_calls_for_each_task(tmp_path: Path) -> None:
    one_takes, one_calls = await calls_for_each_task(1, f"sqlite:///{tmp_path}/one.db?fsync=no")
    ten_take, ten_call = await calls_for_each_task(10, f"sqlite:///{tmp_path}/ten.db?fsync=no")
    assert ten_take < 1.3 * one_takes / 10
    assert one_calls < 3.5
    assert ten_call < 1.3 * one_calls


@virtual
async def test_idle_supervisors_do_not_all_ask_for_the_same_record(file: str) -> None:
    calls, agent, tasks = Counter[str](), Agent(seconds=0.05), 200
    channel: list[Callable[[], None]] = []

    def store() -> Any:
        return ChannelStore(open_task_store(file), calls, channel)

    async with contextlib.AsyncExitStack() as stack:
        here = await stack.enter_async_context(make_supervisor(agent, store(), max_queue_size=0))
        here.pause("work")
        for _ in range(10):
            await stack.enter_async_context(make_supervisor(agent, store(), slots=2))
        await asyncio.sleep(1.0)
        calls.clear()
        for number in range(tasks):
            await spill(here, Task("work", number))  # all ten notice it at the same moment
            await asyncio.sleep(0.05)
        await agent.wait_for_calls(tasks)
        assert calls["lease"] < 2.5 * tasks
        assert calls["depths"] < 12.0 * tasks


@virtual
async def test_idle_supervisors_leave_a_store_alone_in_which_nothing_happens(file: str) -> None:
    calls = Counter[str]()
    async with fleet(10, Agent(), file, calls):
        calls.clear()
        await asyncio.sleep(80.0)
        assert calls.total() == 0


@virtual
async def test_lookups_of_many_awaited_tasks_are_bounded(file: str) -> None:
    calls = Counter[str]()
    store: Any = CountingStore(open_task_store(file), calls)
    async with make_supervisor(Agent(), store, max_queue_size=0) as here:
        here.pause("work")
        tickets = await spill(here, *(Task("work", number) for number in range(500)))
        waiters = [asyncio.ensure_future(_result(ticket)) for ticket in tickets]
        await asyncio.sleep(1.0)
        calls.clear()
        async with BackpressureSupervisor(overflow=file, lease=LEASE) as other:
            other.register_worker("busy", handler=Agent(seconds=0.0), task_types=["busy"], max_concurrent=4)
            since = now()
            while now() < since + 10.0:
                await other.run(Task("busy", durable=True))
                await asyncio.sleep(0.05)
        assert 0 < calls["find"] < 5_000  # in ten seconds
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)


async def _result(ticket: Any) -> Any:
    return await ticket


# --- a loaded upstream ------------------------------------------------------------------------------------------------


@virtual
async def test_records_are_left_to_others_while_an_upstream_is_under_pressure(file: str) -> None:
    """A process whose upstream is full takes few records, and one with room the rest."""
    key = Upstream("key", max_concurrent=10, max_wait=1000.0)

    async def call(_: Task) -> None:
        async with key.call():
            await asyncio.sleep(LEASE)

    agent = Agent(seconds=1.0)
    async with key.call():
        await asyncio.sleep(60.0)
    async with contextlib.AsyncExitStack() as stack, submitter(file, max_queue_size=0) as here:
        for _ in range(10):
            await stack.enter_async_context(key.call())
        loaded = BackpressureSupervisor(overflow=file, lease=LEASE)
        loaded.register_worker("worker", handler=call, task_types=["work"], max_concurrent=50, upstreams=[key])
        async with loaded:
            await spill(here, *(Task("work", number) for number in range(40)))
            await asyncio.sleep(5.0)
            statistics = loaded.statistics()
            assert statistics.running + statistics.waiting <= 4
            async with fleet(1, agent, file, slots=4):
                await agent.wait_for_calls(36)
            await loaded.close()

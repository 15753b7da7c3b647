"""The wall clock is set back or forward while a supervisor runs: durations are as long as they were."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.task_plane import Agent, find_result, now, virtual

from forebay import BackpressureSupervisor, Deadline, Task, TaskStatus, WorkerState, clock
from forebay.interfaces import TaskRecord
from forebay.overflow import SqliteTaskStore
from forebay.simulation import virtual_loop

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

HOUR = 3600.0
STEPS = [-HOUR, -30.0, -2.0, 2.0, 30.0, HOUR]


def step(seconds: float) -> None:
    virtual_loop().step_wall_time(seconds)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db?fsync=no"


def make_supervisor(agent: object, url: str | None = None, *, slots: int = 1) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=url)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", STEPS)
@virtual
async def test_a_task_that_runs_past_its_deadline_expires_then_and_its_worker_is_not_blamed(seconds: float) -> None:
    async with make_supervisor(Agent(600.0), slots=10) as supervisor:
        tickets = [supervisor.submit_nowait(Task("work", deadline=Deadline.within(60.0))) for _ in range(10)]
        await asyncio.sleep(5.0)
        step(seconds)
        results = [await ticket for ticket in tickets]
        assert now() == pytest.approx(60.0, abs=0.1)
        assert {result.status for result in results} == {TaskStatus.EXPIRED}
        assert supervisor.workers["worker"].state is not WorkerState.FAILED


@pytest.mark.parametrize("seconds", STEPS)
@virtual
async def test_a_task_that_waits_expires_at_its_deadline_and_not_before(seconds: float) -> None:
    async with make_supervisor(Agent(50.0)) as supervisor:
        first = supervisor.submit_nowait(Task("work"))
        late = supervisor.submit_nowait(Task("work", deadline=Deadline.within(40.0)))
        in_time = supervisor.submit_nowait(Task("work", deadline=Deadline.within(120.0)))
        await asyncio.sleep(5.0)
        step(seconds)
        assert (await late).status is TaskStatus.EXPIRED
        assert now() == pytest.approx(40.0, abs=0.1)
        assert (await first).success
        assert (await in_time).success


@pytest.mark.parametrize("seconds", STEPS)
@virtual
async def test_a_spilled_task_has_the_time_that_it_was_given(seconds: float, url: str) -> None:
    async with make_supervisor(Agent(50.0), url) as supervisor:
        await supervisor.submit(Task("work", durable=True))
        spilled = await supervisor.submit(Task("work", deadline=Deadline.within(120.0), durable=True))
        await asyncio.sleep(5.0)
        step(seconds)
        assert (await spilled).success
        assert now() < 120.0


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
@virtual
async def test_a_handler_sees_how_much_time_is_left_and_so_do_its_children(seconds: float) -> None:
    left = []

    async def handler(task: Task) -> None:
        step(seconds)
        left.append(Deadline.remaining(task.deadline) if task.deadline else 0.0)
        if task.payload == "parent":
            child = Task("work", deadline=Deadline.within(600.0))
            ticket = supervisor.submit_nowait(child)
            assert ticket.deadline is not None
            left.append(ticket.deadline.remaining())
            await ticket

    supervisor = make_supervisor(handler, slots=2)
    async with supervisor:
        task = Task("work", "parent", deadline=Deadline.within(60.0))
        assert (await supervisor.submit_nowait(task)).success
    assert left[:2] == [pytest.approx(60.0, abs=0.1)] * 2


@virtual
async def test_a_deadline_for_another_process_is_by_the_clock_as_it_is_set_now() -> None:
    deadline = Deadline.within(60.0)
    assert deadline.by_wall_clock() == deadline.at
    step(HOUR)
    assert deadline.by_wall_clock() == pytest.approx(clock.wall_time() + 60.0, abs=0.1)
    assert Deadline(deadline.at) == deadline
    assert Deadline(deadline.by_wall_clock()).remaining() == pytest.approx(60.0, abs=0.1)


# --- leases ----------------------------------------------------------------------------------------------------------


async def leave_a_dead_process(url: str, *, lease: float = 30.0) -> str:
    """Store a task that a process leased `lease` seconds from now, and that was killed then; return its id."""
    store = SqliteTaskStore(Path(url.removeprefix("sqlite:///").partition("?")[0]))
    await store.open()
    async with make_supervisor(Agent(), url) as supervisor:
        ticket = await supervisor.submit(Task("work", "of the dead", durable=True))
        await ticket
    record = TaskRecord(
        task_id="dead",
        task_type="work",
        priority=ticket.priority,
        envelope=supervisor._dispatcher_here().spill.encode(Task("work", "of the dead", task_id="dead")),  # type: ignore[union-attr]
        enqueued_at=clock.wall_time(),
    )
    await store.put(record, fence="theirs", until=clock.wall_time() + lease)
    await store.close()
    return record.task_id


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("seconds", [-HOUR, -900.0])
@virtual
async def test_the_lease_of_a_dead_process_expires_though_the_clock_is_set_back(
    seconds: float, url: str, *, before: bool
) -> None:
    """`before`: the clock is set before the supervisor starts, which then knows nothing of it."""
    task_id = await leave_a_dead_process(url)
    if before:
        step(seconds)
    async with make_supervisor(Agent(), url) as supervisor:
        origin = now()
        if not before:
            await asyncio.sleep(5.0)
            step(seconds)
        result = await find_result(supervisor, task_id)
        assert result.success
        assert now() - origin < (1_000.0 if seconds == -900.0 else 330.0)


@pytest.mark.parametrize("seconds", STEPS)
@virtual
async def test_what_runs_is_not_given_to_another_process(seconds: float, url: str) -> None:
    agent, other = Agent(100.0), Agent(100.0)
    async with make_supervisor(agent, url) as first:
        ticket = await first.submit(Task("work", "mine", durable=True))
        await asyncio.sleep(5.0)  # so that the other one looks for lapsed leases before this one has renewed its own
        async with make_supervisor(other, url) as second:
            await asyncio.sleep(7.0)
            step(seconds)
            elsewhere = await find_result(second, ticket.task_id)
            assert elsewhere == await ticket
    assert [*agent.started, *other.started] == ["mine"]


@virtual
async def test_a_clock_that_is_set_again_and_again_loses_nothing_and_stops_nothing(url: str) -> None:
    agent, other = Agent(40.0), Agent(40.0)
    async with make_supervisor(agent, url, slots=4) as first, make_supervisor(other, url, slots=4) as second:
        tickets = []
        for number in range(20):
            deadline = Deadline.within(1_000.0)
            tickets.append(await first.submit(Task("work", number, durable=True, deadline=deadline)))
            step([HOUR, -HOUR, -7.0, 3.0, -2.0 * HOUR, 500.0][number % 6])
            await asyncio.sleep(5.0)
        results = [await ticket for ticket in tickets]
        assert {result.status for result in results} == {TaskStatus.SUCCEEDED}
        states = {supervisor.workers["worker"].state for supervisor in (first, second)}
        assert WorkerState.FAILED not in states
    assert sorted([*agent.started, *other.started]) == list(range(20))

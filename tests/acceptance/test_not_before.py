"""Tasks with a time before which they do not start: they wait in the overflow, or in the supervisor without one."""

from __future__ import annotations

import asyncio
import datetime as dt
import math
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, approximately, error_of, find_result, now, results, run_ready, virtual

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskCancelled, TaskStatus, Verdict, clock
from forebay.errors import InvalidTask, StillSpilled
from forebay.events import TaskStarted, TaskSubmitted
from forebay.interfaces import RecordState
from forebay.overflow import MemoryTaskStore, SqliteTaskStore
from forebay.testing import EventRecord

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

TOMORROW = 86_400.0


def after(seconds: float) -> float:
    return clock.wall_time() + seconds


def about(seconds: float) -> Any:
    """Return something equal to `seconds` except for the time that a store takes."""
    return pytest.approx(seconds, abs=0.1)


def make_supervisor(agent: Any, overflow: Any = None, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=overflow, **options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Return the URL of a durable overflow."""
    return f"sqlite:///{tmp_path}/spill.db?fsync=no"


@pytest.fixture(params=["none", "memory", "sqlite"])
def overflow(request: pytest.FixtureRequest, file: str) -> str | None:
    return {"none": None, "memory": "memory://", "sqlite": file}[request.param]


async def start_times(record: EventRecord) -> dict[str, float]:
    return {event.task_id: event.at for event in record.of_type(TaskStarted)}


# --- the argument -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [60, -1.0, 0, math.inf, math.nan, True, "2030-01-01", dt.datetime(2030, 1, 1, tzinfo=dt.UTC)],
)
def test_a_time_that_is_no_epoch_time_is_an_error(value: Any) -> None:
    with pytest.raises(InvalidTask, match=r"not_before .* must be epoch seconds, for example time.time\(\) \+ 60"):
        Task("work", not_before=value)


@pytest.mark.parametrize("name", ["eta", "countdown", "delay"])
def test_the_names_of_other_libraries_are_explained(name: str) -> None:
    with pytest.raises(TypeError, match="not_before"):
        Task("work", **{name: 60})  # type: ignore[arg-type]


def test_a_deadline_that_passes_before_the_task_may_start_is_an_error() -> None:
    deadline = Deadline.within(60)
    with pytest.raises(InvalidTask, match="must be before its deadline"):
        Task("work", deadline=deadline, not_before=deadline.at)
    assert Task("work", deadline=deadline, not_before=deadline.at - 1).starts_in() == pytest.approx(59, abs=1)


# --- when it starts ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_starts_at_its_time(overflow: str | None) -> None:
    agent = Agent(seconds=1.0)
    async with make_supervisor(agent, overflow) as supervisor:
        record = EventRecord(supervisor)
        later = await supervisor.submit(Task("work", "later", task_id="later", not_before=after(30.0)))
        soon = await supervisor.submit(Task("work", "soon", task_id="soon", not_before=after(10.0)))
        assert await supervisor.run(Task("work", "now", task_id="now")) == "now"  # none of them holds a slot
        assert [result.result for result in await results([later, soon])] == ["later", "soon"]
    starts = await start_times(record)
    assert list(starts) == ["now", "soon", "later"]
    assert starts["soon"] == about(10.0)
    assert starts["later"] == about(30.0)


@virtual
async def test_a_task_whose_time_has_come_starts_at_once(overflow: str | None) -> None:
    async with make_supervisor(Agent(seconds=0.0), overflow) as supervisor:
        for seconds in (-1000.0, 0.0):
            ticket = await supervisor.submit(Task("work", not_before=after(seconds)))
            assert ticket.verdict is Verdict.ADMITTED
            assert (await ticket).success
        assert now() < 0.1


@virtual
async def test_its_place_is_that_of_its_submission_once_it_is_due(file: str) -> None:
    agent = Agent(seconds=10.0)
    async with make_supervisor(agent, file, max_queue_size=1) as supervisor:
        early = await supervisor.submit(Task("work", "early", not_before=after(5.0)))
        others = [await supervisor.submit(Task("work", number)) for number in range(4)]
        urgent = await supervisor.submit(Task("work", "urgent", priority=Priority.HIGH, not_before=after(6.0)))
        await results([early, *others, urgent])
    assert agent.started == [0, 1, "urgent", "early", 2, 3]


@virtual
async def test_a_step_of_the_wall_clock_does_not_move_it(overflow: str | None) -> None:
    agent = Agent(seconds=0.0)
    async with make_supervisor(agent, overflow) as supervisor:
        ticket = await supervisor.submit(Task("work", not_before=after(30.0)))
        asyncio.get_running_loop().step_wall_time(-3600.0)  # type: ignore[attr-defined]
        await ticket
        assert now() == about(30.0)


@virtual
async def test_the_verdict_says_where_it_waits(overflow: str | None) -> None:
    async with make_supervisor(Agent(seconds=0.0), overflow) as supervisor:
        record = EventRecord(supervisor)
        ticket = await supervisor.submit(Task("work", not_before=(at := after(30.0))))
        (submitted,) = record.of_type(TaskSubmitted)
        statistics = supervisor.statistics()
        assert ticket.as_dict()["not_before"] == at
        if overflow is None:
            assert (ticket.verdict, ticket.status, ticket.reason) == (Verdict.ADMITTED, TaskStatus.WAITING, None)
            assert (statistics.delayed, statistics.waiting) == (1, 1)
        else:
            assert (ticket.verdict, ticket.status) == (Verdict.SPILLED, TaskStatus.SPILLED)
            assert ticket.reason == "it waits in the overflow for its not_before"
            assert (statistics.outside, statistics.delayed) == (1, 0)
        assert submitted.verdict is ticket.verdict
        ticket.cancel()


# --- bounds and ends --------------------------------------------------------------------------------------------------


@virtual
async def test_those_that_wait_here_are_bounded() -> None:
    async with make_supervisor(Agent(), max_queue_size=4) as supervisor:
        tickets = [await supervisor.submit(Task("work", not_before=after(30.0))) for _ in range(10)]
        admitted = [ticket for ticket in tickets if ticket]
        assert 0 < len(admitted) <= 5
        refused = tickets[-1]
        assert (refused.verdict, refused.limited_by, refused.retry_after) == (Verdict.REJECTED, "pool:work", None)
        admitted[0].cancel()
        assert await supervisor.submit(Task("work", not_before=after(30.0)))
        for ticket in tickets:
            ticket.cancel()


@virtual
async def test_those_that_wait_in_the_overflow_are_bounded_by_it() -> None:
    async with make_supervisor(Agent(), "memory://?bound=2", max_queue_size=0) as supervisor:
        tickets = [await supervisor.submit(Task("work", not_before=after(30.0))) for _ in range(3)]
        assert [ticket.verdict for ticket in tickets] == [Verdict.SPILLED, Verdict.SPILLED, Verdict.REJECTED]
        assert tickets[2].reason == "the overflow is full"
        tickets[0].cancel()
        await tickets[0]
        assert await supervisor.submit(Task("work", not_before=after(30.0)))
        for ticket in tickets:
            ticket.cancel()
        await supervisor.close()


@virtual
async def test_a_task_that_waits_can_be_cancelled(overflow: str | None) -> None:
    agent = Agent(seconds=0.0)
    async with make_supervisor(agent, overflow) as supervisor:
        ticket = await supervisor.submit(Task("work", task_id="a", key="k", not_before=after(30.0)))
        assert ticket.cancel()
        assert (await ticket).status is TaskStatus.CANCELLED
        again = await supervisor.submit(Task("work", task_id="a", key="k", not_before=after(10.0)))
        assert again is not ticket
        await again
        assert now() == about(10.0)
        await asyncio.sleep(60.0)
        assert len(agent.calls) == 1
        statistics = supervisor.statistics()
        assert (statistics.outside, statistics.waiting, statistics.delayed) == (0, 0, 0)


@virtual
async def test_a_deadline_holds_after_its_time_too(overflow: str | None) -> None:
    async with make_supervisor(Agent(seconds=0.0), overflow) as supervisor:
        supervisor.pause("work")
        ticket = await supervisor.submit(Task("work", not_before=after(10.0), deadline=Deadline.within(20.0)))
        result = await ticket
        assert (result.status, result.attempts, now()) == (TaskStatus.EXPIRED, 0, about(20.0))


@virtual
async def test_an_inherited_deadline_that_passes_first_is_a_rejection(overflow: str | None) -> None:
    async def parent(task: Task) -> Any:
        if task.payload == "child":
            return None
        return await supervisor.submit(Task("work", "child", not_before=after(60.0)))

    supervisor = make_supervisor(parent, overflow)
    async with supervisor:
        ticket = await supervisor.run(Task("work", "parent", deadline=Deadline.within(50.0)))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.reason == "its deadline, 10 s before its not_before, cannot be met"


@virtual
async def test_tasks_that_wait_here_end_with_the_last_worker_of_their_type() -> None:
    async with make_supervisor(Agent()) as supervisor:
        ticket = await supervisor.submit(Task("work", not_before=after(30.0)))
        await supervisor.unregister_worker("worker")
        assert (await ticket).status is TaskStatus.FAILED
        assert now() == approximately(0.0)


# --- together with the rest -------------------------------------------------------------------------------------------


@virtual
async def test_a_key_finds_the_task_that_waits(overflow: str | None) -> None:
    agent = Agent(seconds=0.0)
    async with make_supervisor(agent, overflow) as supervisor:
        first = await supervisor.submit(Task("work", key="k", not_before=after(30.0)))
        assert await supervisor.submit(Task("work", key="k")) is first
        await first
    assert len(agent.calls) == 1


@virtual
async def test_nested_tasks_wait_while_their_parent_lends_its_slot(overflow: str | None) -> None:
    async def parent(task: Task) -> Any:
        if task.payload == "parent":
            return await supervisor.run(Task("work", "child", not_before=after(10.0)))
        return now()

    supervisor = make_supervisor(parent, overflow)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", "parent"))
        assert await supervisor.run(Task("work", "other")) < 1.0
        assert await ticket.value() == about(10.0)


@virtual
async def test_a_map_of_scheduled_tasks_waits_for_all(overflow: str | None) -> None:
    async with make_supervisor(Agent(seconds=0.0), overflow, slots=3) as supervisor:
        assert await supervisor.map("work", range(6), not_before=after(10.0)) == list(range(6))
        assert now() == about(10.0)


@virtual
async def test_a_conversation_goes_on_while_one_of_its_tasks_waits_for_its_time(overflow: str | None) -> None:
    agent = Agent(seconds=4.0)
    async with make_supervisor(agent, overflow, slots=4) as supervisor:
        tickets = [await supervisor.submit(Task("work", "later", thread_id="t", not_before=after(10.0)))]
        tickets += [await supervisor.submit(Task("work", number, thread_id="t")) for number in range(4)]
        await results(tickets)
    assert agent.started == [0, 1, 2, *([3, "later"] if overflow is None else ["later", 3])]
    assert agent.peak == 1


@virtual
async def test_a_task_waits_here_for_its_time_while_its_conversation_is_here(file: str) -> None:
    agent = Agent(seconds=20.0)
    async with make_supervisor(agent, file, slots=4) as supervisor:
        running = await supervisor.submit(Task("work", "running", thread_id="t"))
        later = await supervisor.submit(Task("work", "later", thread_id="t", not_before=after(10.0)))
        assert (later.verdict, later.status) == (Verdict.ADMITTED, TaskStatus.WAITING)
        await results([running, later])
    assert (agent.peak, agent.started) == (1, ["running", "later"])


@virtual
async def test_one_that_may_not_spill_waits_here_and_not_ahead_of_its_conversation_in_the_overflow(file: str) -> None:
    agent = Agent(seconds=3.0)
    async with make_supervisor(agent, file, lease=300.0) as other, make_supervisor(agent, file, lease=300.0) as here:
        here.pause("work")
        stays = await here.submit(Task("work", "stays", thread_id="t", spill=False, not_before=after(1.0)))
        assert stays.status is TaskStatus.WAITING
        stored = await here.submit(Task("work", "stored", thread_id="t", not_before=after(0.5)))
        assert stored.status is TaskStatus.SPILLED
        await agent.wait_for_calls(1)
        assert other.statistics().running == 1
        here.resume("work")
        await results([stays, stored])
        assert now() < 10.0  # and not at the next heartbeat
    assert (agent.peak, agent.started) == (1, ["stored", "stays"])


# --- draining, restarts and other processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [None, "memory://"])
@virtual
async def test_draining_cancels_what_nothing_keeps(overflow: str | None) -> None:
    agent = Agent(seconds=1.0)
    async with make_supervisor(agent, overflow) as supervisor:
        running = await supervisor.submit(Task("work", "running"))
        waiting = await supervisor.submit(Task("work", "waiting", not_before=after(TOMORROW)))
        report = await supervisor.drain()
        assert (report.finished, report.cancelled, now()) == (1, 1, approximately(1.0))
        assert (await running).success
        assert isinstance(await error_of(waiting.value()), TaskCancelled)


@virtual
async def test_draining_waits_for_one_that_a_run_awaits(overflow: str | None) -> None:
    async def parent(task: Task) -> Any:
        if task.payload == "parent":
            return await supervisor.run(Task("work", "child", not_before=after(10.0)))
        return task.payload

    supervisor = make_supervisor(parent, overflow)
    async with supervisor:
        ticket = supervisor.submit_nowait(Task("work", "parent"))
        await run_ready()
        await supervisor.drain()
        if overflow is None or overflow == "memory://":
            assert (await ticket.value(), now()) == ("child", about(10.0))
        else:  # the child is left to the next process, so its parent cannot end as it should
            assert isinstance((await ticket).cause, StillSpilled)
            assert now() < 0.1


@virtual
async def test_draining_leaves_it_in_a_durable_overflow_until_its_time(file: str) -> None:
    agent = Agent(seconds=0.0)
    async with make_supervisor(agent, file) as supervisor:
        tickets = [
            await supervisor.submit(Task("work", 0, task_id="0", not_before=after(100.0))),
            supervisor.submit_nowait(Task("work", 1, task_id="1", not_before=after(200.0))),
            await supervisor.submit(Task("work", 2, task_id="2", not_before=after(300.0), durable=True, spill=False)),
        ]
        stays = await supervisor.submit(Task("work", 3, spill=False, not_before=after(TOMORROW)))
        report = await supervisor.drain()
        assert (report.spilled, report.cancelled, now()) == (1, 1, about(0.0))
        assert [type(await error_of(ticket)) for ticket in tickets] == [StillSpilled] * 3
        assert (await stays).status is TaskStatus.CANCELLED
    store = SqliteTaskStore(Path(file.removeprefix("sqlite:///").partition("?")[0]))
    await store.open()
    assert [each.until for each in await store.list_records(RecordState.DELAYED, 9)] == [
        ticket.task.not_before for ticket in tickets
    ]
    await store.close()
    await asyncio.sleep(50.0)
    async with make_supervisor(agent, file) as successor:
        record = EventRecord(successor)
        for number in range(3):
            assert (await find_result(successor, str(number))).result == number
        assert await start_times(record) == {str(number): about(100.0 * (number + 1)) for number in range(3)}


@virtual
async def test_another_process_starts_it_at_its_time(file: str) -> None:
    agent = Agent(seconds=0.0)
    async with make_supervisor(agent, file, lease=60.0) as other:
        record = EventRecord(other)
        async with make_supervisor(Agent(), file) as here:
            here.pause("work")
            await here.submit(Task("work", "a", task_id="a", not_before=after(30.0)))
        assert (await find_result(other, "a")).result == "a"
        assert (await start_times(record))["a"] == about(30.0)


@virtual
async def test_cancelling_many_keeps_no_times_of_them() -> None:
    async with make_supervisor(Agent(), MemoryTaskStore()) as supervisor:
        for _ in range(1000):
            ticket = await supervisor.submit(Task("work", not_before=after(TOMORROW)))
            ticket.cancel()
            await ticket
        spill = supervisor._dispatcher_here().spill
        assert spill is not None
        assert len(spill.stored.delayed._own) < 200


@virtual
async def test_a_durable_task_that_a_run_awaits_while_draining_waits_here_for_its_time(file: str) -> None:
    async def parent(task: Task) -> Any:
        if task.payload == "parent":
            await asyncio.sleep(1.0)
            return await supervisor.run(Task("work", "child", durable=True, not_before=after(10.0)))
        return now()

    supervisor = make_supervisor(parent, file)
    async with supervisor:
        ticket = await supervisor.submit(Task("work", "parent"))
        await run_ready()
        await supervisor.drain()
        assert await ticket.value() == about(11.0)

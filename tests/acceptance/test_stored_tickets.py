"""Tickets asked for by id or key, in processes that may not serve the task: they end when the store says so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.task_plane import Agent, error_of, find_result, find_ticket, now, virtual

from forebay import BackpressureSupervisor, Deadline, Priority, Task, TaskStatus, Verdict, clock
from forebay.errors import DuplicateTask, UnknownTask
from forebay.interfaces import Completion, RecordState, TaskRecord
from forebay.overflow import SqliteTaskStore

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@dataclass
class Point:
    x: int


def make_supervisor(path: Path, agent: Agent, *, task_type: str = "work", slots: int = 1) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{path}?fsync=no", max_queue_size=0)
    supervisor.register_worker("worker", handler=agent, task_types=[task_type], max_concurrent=slots)
    return supervisor


async def leave_waiting(path: Path, *tasks: Task) -> None:
    """Leave tasks in the overflow, as a process that has ended did."""
    supervisor = make_supervisor(path, Agent(60.0))
    await supervisor.start()
    await supervisor.submit(Task("work", "runs", spill=False))
    for task in tasks:
        await supervisor.submit(task)
    await supervisor.close()


@pytest.mark.parametrize("by", ["id", "key"])
@virtual
async def test_a_ticket_honours_the_deadline_of_a_task_that_nobody_serves(by: str, path: Path) -> None:
    await leave_waiting(path, Task("work", task_id="a", key="k", deadline=Deadline.within(600.0)))
    origin = now()
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        if by == "id":
            ticket = await find_ticket(supervisor, "a")
        else:
            ticket = await supervisor.submit(Task("other", key="k"))
        result = await ticket
        assert result.status is TaskStatus.EXPIRED
        assert now() - origin == pytest.approx(600.0, abs=2.0)
        assert ticket.deadline is not None
    async with make_supervisor(path, agent := Agent()) as supervisor:
        assert (await find_result(supervisor, "a")).status is TaskStatus.EXPIRED
        assert agent.started == []


@pytest.mark.parametrize("by", ["id", "key"])
@virtual
async def test_a_stored_task_is_found_as_it_was_submitted(by: str, path: Path) -> None:
    task = Task("work", {"topic": "rivers"}, task_id="a", key="k", tenant="acme", priority=Priority.LOW, timeout=7.0)
    await leave_waiting(path, task)
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        ticket = await supervisor.find("a") if by == "id" else await supervisor.find(key="k")
        assert ticket is not None
        assert ticket.task == task
        assert (ticket.verdict, ticket.status) == (Verdict.SPILLED, TaskStatus.SPILLED)
        assert ticket.submitted_at is not None
        assert await supervisor.find(key="k") is ticket
        assert supervisor.ticket("a") is ticket


@virtual
async def test_an_id_that_nobody_knows_is_not_found_and_leaves_nothing_behind(path: Path) -> None:
    async with make_supervisor(path, Agent()) as supervisor:
        for _ in range(10):
            assert await supervisor.find("mistyped") is None
            assert await supervisor.find(key="mistyped") is None
        with pytest.raises(UnknownTask):
            supervisor.ticket("mistyped")
        assert supervisor.statistics().waiting == supervisor.statistics().outside == 0
        assert await supervisor.run(Task("work", "new", task_id="mistyped")) == "new"


@virtual
async def test_a_task_that_was_found_before_its_type_was_declared_runs_with_its_declared_type(path: Path) -> None:
    await leave_waiting(path, Task("work", {"x": 1}, task_id="a"))
    seen = []
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        ticket = await supervisor.find("a")
        assert ticket is not None
        assert ticket.task.payload == {"x": 1}
        supervisor.register_worker(
            "late", handler=lambda task: seen.append(task.payload), task_types=["work"], payload=Point
        )
        assert (await ticket).success
    assert seen == [Point(1)]


@virtual
async def test_many_that_look_for_one_stored_task_share_its_ticket(path: Path) -> None:
    await leave_waiting(path, Task("work", "a", task_id="a", key="k"))
    async with make_supervisor(path, Agent(0.0)) as supervisor:
        looking = [supervisor.find("a") if number % 2 else supervisor.find(key="k") for number in range(20)]
        tickets = await asyncio.gather(*looking)
        assert [(await ticket).result for ticket in tickets if ticket is not None] == ["a"] * 20


@virtual
async def test_a_ticket_that_was_asked_for_too_late_expires_at_once(path: Path) -> None:
    await leave_waiting(path, Task("work", task_id="a", deadline=Deadline.within(600.0)))
    await asyncio.sleep(700.0)
    origin = now()
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        assert (await find_result(supervisor, "a")).status is TaskStatus.EXPIRED
        assert now() - origin < 1.0


@virtual
async def test_a_ticket_that_is_only_polled_ends_too(path: Path) -> None:
    await leave_waiting(path, Task("work", "a", task_id="a"))
    async with make_supervisor(path, Agent(), task_type="other") as asking:
        ticket = await find_ticket(asking, "a")
        await asyncio.sleep(1.0)
        assert not ticket.done()
        async with make_supervisor(path, Agent()):
            await asyncio.sleep(30.0)
        assert ticket.done()
        assert ticket.result is not None
        assert ticket.result.result == "a"


@virtual
async def test_the_deadline_of_a_task_whose_process_died_is_honoured_where_nobody_serves_it(path: Path) -> None:
    await leave_waiting(path, Task("work", task_id="a", deadline=Deadline.within(600.0)))
    store = SqliteTaskStore(path)
    await store.open()
    (lease,) = await store.lease("work", 1, until=clock.wall_time() + 30.0)
    await store.begin_attempt(lease)
    await store.close()
    origin = now()
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        assert (await find_result(supervisor, "a")).status is TaskStatus.EXPIRED
        assert now() - origin == pytest.approx(600.0, abs=15.0)


@virtual
async def test_a_ticket_ends_though_the_result_is_not_kept_any_more(path: Path) -> None:
    await leave_waiting(path, Task("work", task_id="a"))
    store = SqliteTaskStore(path)
    await store.open()
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        ticket = await find_ticket(supervisor, "a")
        waiting = asyncio.ensure_future(error_of(ticket))
        await asyncio.sleep(1.0)
        await store.finish("a", Completion(status="succeeded", finished_at=1.0), fence=None)
        await store.prune(before=2.0)
        async with asyncio.timeout(30.0):
            assert isinstance(await waiting, UnknownTask)
        assert ticket.done()
        assert ticket.status is TaskStatus.UNKNOWN  # it ended, and nobody knows how
    await store.close()


@virtual
async def test_of_thousands_of_tickets_each_ends(path: Path) -> None:
    await leave_waiting(path, *[Task("work", task_id=f"{number}") for number in range(1_500)])
    store = SqliteTaskStore(path)
    await store.open()
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        tickets = [await find_ticket(supervisor, f"{number}") for number in range(1_500)]
        waiting = [asyncio.ensure_future(ticket.value()) for ticket in tickets]
        await asyncio.sleep(1.0)
        await store.finish("1499", Completion(status="failed", finished_at=clock.wall_time()), fence=None)
        await store.finish("0", Completion(status="failed", finished_at=clock.wall_time()), fence=None)
        await asyncio.sleep(25.0)
        assert [number for number, ticket in enumerate(tickets) if ticket.done()] == [0, 1499]
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
    await store.close()


class ForgetfulStore(SqliteTaskStore):
    """A store that removes the record of a key's task as soon as it has told its id."""

    async def find_key(self, key: str) -> str | None:
        task_id = await super().find_key(key)
        self.forgotten = task_id
        return task_id

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        return None if task_id == self.forgotten else await super().find(task_id)

    forgotten: str | None = None


@virtual
async def test_a_key_whose_task_is_removed_while_it_is_looked_up_is_new_work(path: Path) -> None:
    await leave_waiting(path, Task("work", task_id="a", key="k"))
    async with BackpressureSupervisor(overflow=ForgetfulStore(path)) as supervisor:
        supervisor.register_worker("other", handler=Agent(), task_types=["other"])
        ticket = await supervisor.submit(Task("other", task_id="b", key="k"))
        assert ticket.task_id == "b"
        assert (await ticket).status is TaskStatus.SUCCEEDED
        assert await supervisor.submit(Task("other", key="k")) is ticket


@virtual
async def test_an_id_that_somebody_asks_for_before_it_is_submitted_is_no_duplicate(path: Path) -> None:
    async with make_supervisor(path, Agent(), slots=2) as supervisor:
        finding = asyncio.ensure_future(supervisor.find("a"))
        ticket = await supervisor.submit(Task("work", task_id="a"))
        assert (await ticket).status is TaskStatus.SUCCEEDED
        assert await finding in (None, ticket)
    await leave_waiting(path, Task("work", task_id="b"))
    async with make_supervisor(path, Agent(), task_type="other") as supervisor:
        early = await find_ticket(supervisor, "b")
        with pytest.raises(DuplicateTask):
            await supervisor.submit(Task("other", task_id="b"))
        assert early.status is TaskStatus.SPILLED

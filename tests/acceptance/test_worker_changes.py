"""Changes while a supervisor runs: workers are unregistered and resized, task types are paused and resumed."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tests.support.task_plane import (
    Agent,
    UncancellableHandler,
    approximately,
    error_of,
    fill,
    flood,
    now,
    rejected,
    run_ready,
    statuses,
    virtual,
)

from forebay import (
    BackpressureSupervisor,
    Deadline,
    Overloaded,
    Priority,
    Retry,
    Task,
    TaskFailed,
    TaskStatus,
    Tenant,
    Verdict,
)
from forebay.adapters import Handler
from forebay.errors import (
    InvalidSetting,
    NotStarted,
    StoreUnavailable,
    SupervisorClosed,
    UnknownTaskType,
    UnknownWorker,
    UnregisteredInside,
)
from forebay.events import TaskTypePaused, TaskTypeResumed, WorkerResized, WorkerUnregistered
from forebay.overflow import SqliteTaskStore
from forebay.testing import EventRecord, FlakyHandler, HeldHandler

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own

SUCCEEDED, FAILED, CANCELLED = TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.CANCELLED


# --- unregister_worker -----------------------------------------------------------------------------------------------


@virtual
async def test_what_runs_on_an_unregistered_worker_finishes_and_what_waits_goes_to_the_others() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("old", handler=Agent(10.0), task_types=["work"])
        running, *waiting = flood(supervisor, "work", 3)
        supervisor.register_worker("new", handler=Agent(2.0), task_types=["work"])
        await supervisor.unregister_worker("old")
        assert now() == approximately(10.0)
        assert (await running).worker_id == "old"
        assert [(await ticket).worker_id for ticket in waiting] == ["new", "new"]
        assert list(supervisor.workers) == ["new"]
        assert [event.cut for event in record.of_type(WorkerUnregistered)] == [0]
        assert await supervisor.run(Task("work", 7)) == 7


@virtual
async def test_a_leaving_worker_begins_nothing_new_and_has_no_slots() -> None:
    async with BackpressureSupervisor() as supervisor:
        old = supervisor.register_worker("old", handler=Agent(10.0), task_types=["work"], max_concurrent=2)
        supervisor.register_worker("new", handler=Agent(10.0), task_types=["work"])
        flood(supervisor, "work", 1)
        leaving = asyncio.create_task(supervisor.unregister_worker("old"))
        await run_ready()
        flood(supervisor, "work", 3)
        assert (old.current_tasks, old.slots, old.leaving) == (1, 0, True)
        assert [worker.leaving for worker in supervisor.statistics().workers] == [True, False]
        assert supervisor.statistics().waiting == 2
        await leaving


@virtual
async def test_after_its_limit_what_runs_on_an_unregistered_worker_is_cancelled() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("old", handler=Agent(100.0), task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await supervisor.unregister_worker("old", timeout=3)
        assert now() == approximately(3.0)
        result = await ticket
        assert result.status is CANCELLED
        assert "worker 'old' was unregistered, and it had not ended after 3 s" in str(result.error)
        assert [event.cut for event in record.of_type(WorkerUnregistered)] == [1]


@virtual
async def test_what_waits_for_the_last_worker_of_a_type_fails_once_that_is_gone() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("other", handler=Agent(), task_types=["else"])
        supervisor.register_worker("only", handler=Agent(5.0), task_types=["work", "else"])
        running, waiting = flood(supervisor, "work", 2)
        leaving = asyncio.create_task(supervisor.unregister_worker("only"))
        await run_ready()
        with pytest.raises(Overloaded, match="every worker for 'work' was unregistered"):
            await supervisor.run(Task("work"))
        await leaving
        assert (await running).status is SUCCEEDED
        with pytest.raises(
            TaskFailed, match="' failed: worker 'only', the last one for 'work', was unregistered"
        ) as caught:
            await waiting.value()
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - ours
        with pytest.raises(UnknownTaskType):
            supervisor.submit_nowait(Task("work"))
        assert await supervisor.run(Task("else", 3)) == 3


@virtual
async def test_what_waits_is_taken_by_a_worker_that_comes_while_the_last_one_leaves() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("old", handler=Agent(5.0), task_types=["work"])
        _, waiting = flood(supervisor, "work", 2)
        leaving = asyncio.create_task(supervisor.unregister_worker("old"))
        await run_ready()
        supervisor.register_worker("new", handler=Agent(1.0), task_types=["work"])
        assert (await waiting).worker_id == "new"
        await leaving
        assert await supervisor.run(Task("work", 1)) == 1


@virtual
async def test_messages_that_wait_behind_their_conversation_for_an_unregistered_type_fail_too() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("ask", handler=Agent(50.0), task_types=["ask"])
        supervisor.register_worker("tell", handler=Agent(), task_types=["tell"])
        first = supervisor.submit_nowait(Task("ask", thread_id="chat"))
        second = supervisor.submit_nowait(Task("tell", thread_id="chat"))
        third = supervisor.submit_nowait(Task("ask", thread_id="chat"))
        await supervisor.unregister_worker("tell")
        assert (await second).status is FAILED
        assert now() == approximately(0.0)
        assert await statuses([first, third]) == [SUCCEEDED, SUCCEEDED]


@virtual
async def test_a_run_on_a_leaving_worker_may_use_nested_tasks_of_the_same_worker() -> None:
    async def factorial(task: Task) -> int:
        await asyncio.sleep(1)
        if task.payload < 2:
            return 1
        below: int = await supervisor.run(Task("factorial", task.payload - 1))
        return int(task.payload) * below

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("only", handler=factorial, task_types=["factorial"])
        ticket = supervisor.submit_nowait(Task("factorial", 4))
        later = supervisor.submit_nowait(Task("factorial", 1))
        await run_ready()
        await supervisor.unregister_worker("only")
        assert (await ticket).result == 24
        assert (await later).status is FAILED  # it had not begun


@virtual
async def test_a_zombie_of_an_unregistered_worker_does_not_keep_its_name_or_its_type() -> None:
    agent = UncancellableHandler(60.0)
    async with BackpressureSupervisor(zombie_grace=1) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        running, waiting = flood(supervisor, "work", 2)
        await run_ready()
        await supervisor.unregister_worker("worker", timeout=0)
        assert now() == approximately(1.0)
        assert [(await running).status, (await waiting).status] == [CANCELLED, FAILED]
        assert not supervisor.workers
        supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        assert await supervisor.run(Task("work", 1)) == 1
        await supervisor.unregister_worker("worker")
        await asyncio.sleep(60)
        with pytest.raises(UnknownTaskType):
            supervisor.submit_nowait(Task("work"))


@virtual
async def test_stored_tasks_of_an_unregistered_type_wait_in_the_overflow_for_its_next_worker(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    async with BackpressureSupervisor(overflow=url, max_queue_size=1) as supervisor:
        supervisor.register_worker("old", handler=Agent(100.0), task_types=["work"])
        tickets = [await supervisor.submit(Task("work", number, durable=True)) for number in range(4)]
        await supervisor.unregister_worker("old", timeout=1)
        await asyncio.sleep(1)
        assert supervisor.statistics().outside == 4
        supervisor.register_worker("new", handler=Agent(1.0), task_types=["work"])
        async with asyncio.timeout(60):
            results = [await ticket for ticket in tickets]
        assert [(result.worker_id, result.result) for result in results] == [("new", n) for n in range(4)]


@virtual
async def test_a_stored_task_that_is_cut_off_keeps_its_ticket_and_runs_on_another_worker(tmp_path: Path) -> None:
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/tasks.db") as supervisor:
        supervisor.register_worker("old", handler=Agent(100.0), task_types=["work"])
        ticket = await supervisor.submit(Task("work", 1, durable=True))
        supervisor.register_worker("new", handler=Agent(2.0), task_types=["work"])
        await supervisor.unregister_worker("old", timeout=1)
        result = await ticket
        assert (result.worker_id, result.status, result.attempts) == ("new", SUCCEEDED, 1)  # a restart counts no crash


@virtual
async def test_a_stored_task_that_is_cancelled_while_it_is_cut_off_ends_cancelled(tmp_path: Path) -> None:
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/tasks.db", zombie_grace=5) as supervisor:
        supervisor.register_worker("old", handler=UncancellableHandler(3.0), task_types=["work"])
        supervisor.register_worker("new", handler=Agent(2.0), task_types=["work"], max_concurrent=1)
        blocker, ticket = [await supervisor.submit(Task("work", n, durable=True)) for n in range(2)]
        old = blocker if (blocker.run and blocker.run.worker.name == "old") else ticket
        await run_ready()
        leaving = asyncio.create_task(supervisor.unregister_worker("old", timeout=0))
        await asyncio.sleep(0.5)
        assert old.cancel()
        await leaving
        assert (await old).status is CANCELLED


@virtual
async def test_the_handler_of_an_unregistered_worker_is_stopped_once_and_after_its_runs() -> None:
    log: list[str] = []

    async def work(_: Task) -> None:
        await asyncio.sleep(2)
        log.append("ended")

    inner = BackpressureSupervisor()
    inner.register_worker("inner", handler=work, task_types=["work"])
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("fleet", handler=inner, task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        await run_ready()
        await supervisor.unregister_worker("fleet")
        assert (await ticket).status is SUCCEEDED
        with pytest.raises(SupervisorClosed):
            inner.submit_nowait(Task("work"))
    assert log == ["ended"]


@virtual
async def test_unregistering_is_checked() -> None:
    async with BackpressureSupervisor() as supervisor:

        async def leave(_: Task) -> None:
            await supervisor.unregister_worker("worker")

        supervisor.register_worker("worker", handler=leave, task_types=["work"])
        with pytest.raises(UnknownWorker, match=r"No worker is named .wroker. .there are: worker."):
            await supervisor.unregister_worker("wroker")
        with pytest.raises(InvalidSetting, match="timeout=-1"):
            await supervisor.unregister_worker("worker", timeout=-1)
        failure = await error_of(supervisor.run(Task("work", task_id="t")))
        assert isinstance(failure.__cause__, UnregisteredInside)
        await supervisor.unregister_worker("worker")
        with pytest.raises(UnknownWorker, match="there are: none"):
            await supervisor.unregister_worker("worker")


@virtual
async def test_a_worker_may_be_unregistered_by_itself_and_not_by_another_one_of_its_name() -> None:
    async with BackpressureSupervisor() as supervisor:
        first = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        await supervisor.unregister_worker(first)
        assert list(supervisor.workers) == []
        second = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        with pytest.raises(UnknownWorker, match="another worker"):
            await supervisor.unregister_worker(first)
        assert list(supervisor.workers.values()) == [second]


@virtual
async def test_a_worker_may_be_unregistered_before_the_start() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("first", handler=Agent(), task_types=["work"], payload=int)
    supervisor.register_worker("second", handler=Agent(), task_types=["work", "else"])
    await supervisor.unregister_worker("first")
    async with supervisor:
        assert list(supervisor.workers) == ["second"]
        assert await supervisor.run(Task("work", 1)) == 1


@virtual
async def test_workers_are_unregistered_and_revived_between_two_runs() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("old", handler=Agent(), task_types=["work"], payload=int)
    async with supervisor:
        pass
    late = supervisor.register_worker("late", handler=Agent(), task_types=["late"])
    late.revive()
    await supervisor.unregister_worker("late")
    await supervisor.unregister_worker("old")
    assert list(supervisor.workers) == []
    supervisor.register_worker("new", handler=Agent(), task_types=["work", "late"], payload=str)
    async with supervisor:
        assert await supervisor.run(Task("late", "x")) == "x"


@pytest.mark.parametrize("when", [0.0, 1.0, 5.5])  # before its first step, while it waits, while it stops the handler
@virtual
async def test_a_program_that_cancels_every_asyncio_task_does_not_keep_a_worker_that_goes(when: float) -> None:
    handler = UncancellableHandler(8.0)
    async with BackpressureSupervisor(zombie_grace=1.0) as supervisor:
        supervisor.register_worker("other", handler=Agent(), task_types=["work"], max_concurrent=2)
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        supervisor.pause("work")
        flood(supervisor, "work", 3)
        supervisor.resume("work")
        await run_ready()
        leaving = asyncio.create_task(supervisor.unregister_worker("worker", timeout=5.0))
        await asyncio.sleep(0.0)
        if when:
            await asyncio.sleep(when)
        for task in asyncio.all_tasks() - {asyncio.current_task(), leaving}:
            task.cancel()
        async with asyncio.timeout(30.0):
            await leaving
        assert list(supervisor.workers) == ["other"]
        await asyncio.sleep(30.0)  # until its zombie has ended
        assert [pool.finishing for pool in supervisor._running().core.pools.by_type.values()] == [0]
        assert await supervisor.run(Task("work", 1)) == 1


@virtual
async def test_reviving_a_worker_that_is_gone_does_nothing() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        await supervisor.unregister_worker("worker")
        worker.revive()
        again = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
        worker.revive()
        assert supervisor.workers["worker"] is again
        assert await supervisor.run(Task("work", 1)) == 1


@virtual
async def test_a_type_may_be_declared_again_once_its_workers_are_gone() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("first", handler=Agent(), task_types=["work"], payload=int)
        await supervisor.unregister_worker("first")
        supervisor.register_worker("second", handler=Agent(), task_types=["work"], payload=str)
        assert await supervisor.run(Task("work", "text")) == "text"


@virtual
async def test_closing_ends_a_removal_in_progress() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(100.0), task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        leaving = asyncio.create_task(supervisor.unregister_worker("worker"))
        await run_ready()
        await supervisor.close()
        assert (await ticket).status is CANCELLED
        await leaving  # what ran there was stopped, so it is gone
        assert now() == approximately(0.0)


@virtual
async def test_a_cancelled_removal_goes_on_and_a_second_one_waits_for_it() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(10.0), task_types=["work"])
        (ticket,) = flood(supervisor, "work", 1)
        leaving = asyncio.create_task(supervisor.unregister_worker("worker"))
        await run_ready()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        await supervisor.unregister_worker("worker")
        assert now() == approximately(10.0)
        assert ticket.done()
        assert not supervisor.workers


@pytest.mark.parametrize("types", [1, 12])
@virtual
async def test_nothing_of_an_unregistered_worker_is_kept(types: int) -> None:
    class Robot:
        async def __call__(self, task: Task) -> Any:
            return task.payload

    task_types = [f"type {number}" for number in range(types)]
    async with BackpressureSupervisor(keep_results=0) as supervisor:
        supervisor.register_worker("stays", handler=Agent(), task_types=["type 0"])
        known: list[weakref.ref[Any]] = []
        for number in range(20):
            robot = Robot()
            worker = supervisor.register_worker(f"worker {number}", handler=robot, task_types=task_types)
            for task_type in task_types:
                await supervisor.run(Task(task_type, 1))
                flood(supervisor, task_type, 3)
            await supervisor.unregister_worker(worker.name)
            known += weakref.ref(robot), weakref.ref(worker)
            del robot, worker
        await asyncio.sleep(11)  # the timers of failures hold a worker for ten seconds
        gc.collect()
        assert [ref() for ref in known if ref() is not None] == []
        assert set(supervisor.workers) == {"stays"}
        assert len(supervisor.readings()) == 2  # of the pool of its type, and of the host


# --- pause and resume ------------------------------------------------------------------------------------------------


@virtual
async def test_nothing_of_a_paused_type_begins_until_it_is_resumed() -> None:
    agent = Agent(1.0)
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        supervisor.register_worker("worker", handler=agent, task_types=["work", "else"], max_concurrent=2)
        running = flood(supervisor, "work", 3)
        supervisor.pause("work")
        supervisor.pause("work")
        waiting = flood(supervisor, "work", 2)
        await asyncio.sleep(5)
        assert [ticket.done() for ticket in running] == [True, True, False]
        assert [ticket.status for ticket in waiting] == [TaskStatus.WAITING] * 2
        assert await supervisor.run(Task("else", 1)) == 1
        assert supervisor.statistics().paused == ("work",)
        supervisor.resume("work")
        supervisor.resume("work")
        assert await statuses([*running, *waiting]) == [SUCCEEDED] * 5
        assert now() == approximately(8.0)
        assert supervisor.statistics().paused == ()
        assert [event.task_type for event in record.of_type(TaskTypePaused)] == ["work"]
        assert [event.task_type for event in record.of_type(TaskTypeResumed)] == ["work"]


@virtual
async def test_a_paused_type_takes_what_fits_into_its_queue_and_no_more() -> None:
    async with BackpressureSupervisor(max_queue_size=10) as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"], max_concurrent=90)
        supervisor.pause("work")
        assert supervisor.system_load() == 0
        tickets = flood(supervisor, "work", 20)
        assert [ticket.verdict for ticket in tickets[:8]] == [Verdict.ADMITTED] * 8
        assert len(rejected(tickets)) == 12
        assert "'work' is paused, and pool:work is at 80%" in str(tickets[-1].reason)
        assert tickets[-1].retry_after is None
        assert supervisor.system_load() == pytest.approx(0.8)
        supervisor.resume("work")
        assert supervisor.system_load() == pytest.approx(0.08)


@virtual
async def test_a_deadline_ends_a_task_of_a_paused_type() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        supervisor.pause("work")
        ticket = supervisor.submit_nowait(Task("work", deadline=Deadline.within(5)))
        assert ticket.verdict is Verdict.ADMITTED
        assert (await ticket).status is TaskStatus.EXPIRED
        assert now() == approximately(5.0)


@virtual
async def test_what_is_stored_of_a_paused_type_stays_in_the_overflow(overflow: str) -> None:
    async with BackpressureSupervisor(overflow=overflow, max_queue_size=2) as supervisor:
        supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        supervisor.pause("work")
        queued = flood(supervisor, "work", 2)
        stored = [await supervisor.submit(Task("work", priority=Priority.HIGH))]
        queued.pop().cancel()
        stored.append(await supervisor.submit(Task("work", priority=Priority.HIGH)))  # there is room, and no slot
        await asyncio.sleep(60)
        statistics = supervisor.statistics()
        assert (statistics.waiting, statistics.outside) == (1, 2)
        supervisor.resume("work")
        assert await statuses([*queued, *stored]) == [SUCCEEDED] * 3


@virtual
async def test_nested_tasks_of_a_paused_type_wait_and_their_runs_go_on_after_that() -> None:
    async def outer(task: Task) -> Any:
        return await supervisor.run(Task("inner", task.payload))

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("outer", handler=outer, task_types=["outer"])
        supervisor.register_worker("inner", handler=Agent(1.0), task_types=["inner"])
        supervisor.pause("inner")
        ticket = supervisor.submit_nowait(Task("outer", 1))
        await asyncio.sleep(10)
        assert not ticket.done()
        supervisor.resume("inner")
        assert (await ticket).result == 1
        assert now() == approximately(11.0)


@pytest.mark.parametrize("types", [1, 12])
@virtual
async def test_a_paused_type_keeps_its_waiting_tasks_for_the_worker_that_replaces_the_last_one(types: int) -> None:
    task_types = [f"type {number}" for number in range(types)]
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("old", handler=Agent(1.0), task_types=task_types)
        for task_type in task_types:
            supervisor.pause(task_type)
        waiting = [ticket for task_type in task_types for ticket in flood(supervisor, task_type, 2)]
        await supervisor.unregister_worker("old")
        waiting += flood(supervisor, "type 0", 1)
        supervisor.register_worker("new", handler=Agent(1.0), task_types=task_types)
        await asyncio.sleep(5)
        assert not any(ticket.done() for ticket in waiting)
        for task_type in task_types:
            supervisor.resume(task_type)
        assert {(await ticket).worker_id for ticket in waiting} == {"new"}


@virtual
async def test_resuming_a_type_without_a_worker_ends_what_waits() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("only", handler=Agent(1.0), task_types=["work"])
        supervisor.pause("work")
        (waiting,) = flood(supervisor, "work", 1)
        await supervisor.unregister_worker("only")
        supervisor.resume("work")
        assert "was resumed, and no worker is registered for it" in str((await waiting).error)
        with pytest.raises(UnknownTaskType):
            supervisor.resume("work")


@virtual
async def test_draining_does_not_wait_for_what_is_paused() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(3.0), task_types=["work"])
        running, waiting = flood(supervisor, "work", 2)
        supervisor.pause("work")
        report = await supervisor.drain()
        assert now() == approximately(3.0)
        assert (report.finished, report.cancelled) == (1, 1)
        assert await statuses([running, waiting]) == [SUCCEEDED, CANCELLED]


@virtual
async def test_pausing_ends_a_drain_that_would_wait_for_what_is_paused() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=Agent(3.0), task_types=["work"])
        flood(supervisor, "work", 10)
        draining = asyncio.create_task(supervisor.drain())
        await asyncio.sleep(1)
        with pytest.raises(UnknownTaskType):
            supervisor.pause("else")
        supervisor.pause("work")
        assert (await draining).cancelled == 9


@virtual
async def test_pausing_needs_a_running_supervisor_and_a_known_type() -> None:
    supervisor = BackpressureSupervisor()
    with pytest.raises(NotStarted):
        supervisor.pause("work")
    async with supervisor:
        with pytest.raises(UnknownTaskType):
            supervisor.resume("work")


# --- resize ----------------------------------------------------------------------------------------------------------


@virtual
async def test_more_slots_take_waiting_tasks_at_once() -> None:
    async with BackpressureSupervisor() as supervisor:
        record = EventRecord(supervisor)
        worker = supervisor.register_worker("worker", handler=Agent(1.0), task_types=["work"])
        tickets = flood(supervisor, "work", 5)
        worker.resize(5)
        worker.resize(5)
        assert (worker.current_tasks, worker.max_concurrent, worker.max_open) == (5, 5, 10)
        assert await statuses(tickets) == [SUCCEEDED] * 5
        assert now() == approximately(1.0)
        events = [(event.before, event.max_concurrent) for event in record.of_type(WorkerResized)]
        assert events == [(1, 5)]


@virtual
async def test_fewer_slots_end_no_run_and_begin_none_until_enough_have_ended() -> None:
    agent = HeldHandler()
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=5)
        tickets = flood(supervisor, "work", 8)
        await run_ready()
        worker.resize(2)
        assert (worker.current_tasks, worker.slots, worker.load_factor) == (5, 2, 1.0)
        assert supervisor.utilization() == 1.0
        started = []
        for _ in range(5):
            agent.release(1)
            await run_ready()
            started.append(supervisor.statistics().running)
        assert started == [4, 3, 2, 2, 2]
        agent.release(3)
        assert await statuses(tickets) == [SUCCEEDED] * 8


@virtual
async def test_the_load_follows_a_resize() -> None:
    async with BackpressureSupervisor(max_queue_size=10) as supervisor:
        worker = supervisor.register_worker("worker", handler=Agent(100.0), task_types=["work"], max_concurrent=10)
        flood(supervisor, "work", 10)
        assert supervisor.system_load() == pytest.approx(0.5)
        worker.resize(40)
        assert supervisor.system_load() == pytest.approx(0.2)
        worker.resize(10)
        assert supervisor.system_load() == pytest.approx(0.5)


@virtual
async def test_an_open_bound_that_was_set_stays_unless_it_is_too_small() -> None:
    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=2, max_open=3)
    bounds = []
    for slots in (1, 2, 5, 1):
        worker.resize(slots)
        bounds.append(worker.max_open)
    assert bounds == [3, 3, 5, 3]


@virtual
async def test_a_worker_that_zombies_filled_works_again_when_it_gets_a_slot_more() -> None:
    async with BackpressureSupervisor(zombie_grace=1) as supervisor:
        handler = UncancellableHandler(1000.0)
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], timeout=1)
        flood(supervisor, "work", 1)
        await asyncio.sleep(3)
        assert worker.state.name == "FAILED"
        worker.resize(2)
        assert worker.state.name == "BUSY"
        ticket = supervisor.submit_nowait(Task("work", priority=Priority.CRITICAL))
        await run_ready()
        assert ticket.status is TaskStatus.RUNNING
        worker.resize(1)
        assert worker.state.name == "FAILED"


@virtual
async def test_a_size_is_a_whole_number() -> None:
    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    for wrong in (0, -1, 1.5, True, None):
        with pytest.raises(InvalidSetting, match="max_concurrent"):
            worker.resize(wrong)  # type: ignore[arg-type]
    assert worker.max_concurrent == 1


# --- in great numbers ------------------------------------------------------------------------------------------------


@virtual
async def test_registering_and_removing_a_worker_costs_the_same_however_many_there_are() -> None:
    async def calls_per_worker(count: int) -> float:
        calls = 0

        def profile(_frame: FrameType, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")  # resuming a generator is one, so a search of the workers shows

        async with BackpressureSupervisor() as supervisor:
            sys.setprofile(profile)
            try:
                for number in range(count):
                    supervisor.register_worker(f"worker {number}", handler=Agent(), task_types=["work", "else"])
                for number in (*range(0, count, 2), *range(1, count, 2)):
                    await supervisor.unregister_worker(f"worker {number}")
            finally:
                sys.setprofile(None)
        return calls / count

    await calls_per_worker(10)
    few, many = await calls_per_worker(50), await calls_per_worker(500)
    assert many <= 1.1 * few


# --- retries, and producers that wait for room -----------------------------------------------------------------------


@virtual
async def test_a_task_that_waits_for_its_next_attempt_ends_when_its_type_is_gone() -> None:
    def fails(_: Task) -> None:
        raise ValueError("no")

    async with BackpressureSupervisor() as supervisor:
        retry = Retry(base_delay=1000.0, max_delay=1000.0)
        supervisor.register_worker("only", handler=fails, task_types=["work"], retry=retry)
        (ticket,) = flood(supervisor, "work", 1)
        await run_ready()
        await supervisor.unregister_worker("only")
        result = await ticket
        assert result.status is FAILED
        assert now() < 1.0
        assert supervisor.statistics().waiting == supervisor.statistics().delayed == 0


@virtual
async def test_producers_that_wait_for_room_notice_a_new_worker_a_resumed_type_and_one_that_is_gone() -> None:
    async with BackpressureSupervisor(max_queue_size=1) as supervisor:
        supervisor.register_worker("slow", handler=Agent(1000.0), task_types=["work"])
        await fill(supervisor, "work")
        waits = asyncio.create_task(supervisor.submit(Task("work"), wait=100.0))
        await run_ready()
        supervisor.register_worker("new", handler=Agent(1.0), task_types=["work"])
        assert (await waits).verdict is Verdict.ADMITTED
        assert now() < 0.1

        supervisor.register_worker("other", handler=Agent(1.0), task_types=["else"])
        supervisor.pause("else")
        await fill(supervisor, "else")
        waits = asyncio.create_task(supervisor.submit(Task("else"), wait=100.0))
        await run_ready()
        supervisor.resume("else")
        assert (await waits).verdict is Verdict.ADMITTED
        assert now() < 0.1

        await fill(supervisor, "else")
        supervisor.pause("else")
        waits = asyncio.create_task(supervisor.submit(Task("else"), wait=100.0))
        await run_ready()
        await supervisor.unregister_worker("other", timeout=0)
        supervisor.resume("else")
        assert isinstance(await error_of(waits), UnknownTaskType)
        assert now() < 0.1

        supervisor.register_worker("last", handler=Agent(1000.0), task_types=["last"])
        await fill(supervisor, "last")
        waits = asyncio.create_task(supervisor.submit(Task("last"), wait=100.0))
        await run_ready()
        await supervisor.unregister_worker("last", timeout=0)
        assert isinstance(await error_of(waits), UnknownTaskType)
        assert now() < 0.1


@virtual
async def test_what_waits_in_an_overflow_in_memory_for_the_last_worker_of_a_type_fails_once_that_is_gone() -> None:
    async with BackpressureSupervisor(overflow="memory://", max_queue_size=0) as supervisor:
        supervisor.register_worker("only", handler=Agent(10.0), task_types=["work"])
        tickets = [await supervisor.submit(Task("work")) for _ in range(3)]
        assert [ticket.verdict for ticket in tickets] == [Verdict.ADMITTED, Verdict.SPILLED, Verdict.SPILLED]
        await supervisor.unregister_worker("only", timeout=0)
        assert await statuses(tickets) == [CANCELLED, FAILED, FAILED]
        assert now() < 1.0
        await run_ready()
        assert supervisor.statistics().outside == 0


@virtual
async def test_a_task_that_runs_on_the_last_worker_and_goes_back_to_an_overflow_in_memory_ends() -> None:
    async with BackpressureSupervisor(overflow="memory://", max_queue_size=0) as supervisor:
        supervisor.register_worker("only", handler=Agent(10.0), task_types=["work"])
        tickets = [await supervisor.submit(Task("work")) for _ in range(2)]
        await tickets[0]
        await run_ready()
        assert tickets[1].status is TaskStatus.RUNNING
        await supervisor.unregister_worker("only", timeout=0)
        async with asyncio.timeout(1.0):
            assert await statuses(tickets) == [SUCCEEDED, FAILED]
        assert "no worker is registered for 'work' any more" in str((await tickets[1]).error)
        await run_ready()
        assert supervisor.statistics().outside == 0


class GatedStore(SqliteTaskStore):
    """A store that holds back the leases that it has made until `answers` is set."""

    answers: asyncio.Event

    async def open(self) -> None:
        self.answers = asyncio.Event()
        await super().open()

    async def lease(self, *args: Any, **options: Any) -> Any:
        leases = await super().lease(*args, **options)
        if leases:
            await self.answers.wait()
        return leases


@virtual
async def test_a_record_that_comes_back_while_a_zombie_keeps_its_type_waits_for_the_next_worker(tmp_path: Path) -> None:
    store = GatedStore(tmp_path / "spill.db")
    async with BackpressureSupervisor(overflow=store, max_queue_size=0, zombie_grace=1.0) as supervisor:
        stubborn, agent = UncancellableHandler(50.0), Agent(1.0)

        async def handle(task: Task) -> Any:
            return await (stubborn if task.payload == "stubborn" else agent)(task)

        supervisor.register_worker("old", handler=handle, task_types=["work"], max_concurrent=2)
        tickets = [await supervisor.submit(Task("work", payload)) for payload in ("stubborn", "short", "stored")]
        await tickets[1]
        await run_ready()  # now the record of the third one is being leased
        await supervisor.unregister_worker("old", timeout=0)
        store.answers.set()
        await asyncio.sleep(1.0)
        assert tickets[2].status is TaskStatus.SPILLED
        await asyncio.sleep(100.0)  # until the zombie has ended, and its type is not known any more
        assert tickets[2].status is TaskStatus.SPILLED
        supervisor.register_worker("new", handler=agent, task_types=["work"])
        async with asyncio.timeout(60.0):
            assert (await tickets[2]).worker_id == "new"


class UndelayedStore(SqliteTaskStore):
    """A store that cannot delay."""

    async def delay(self, *_: Any, **__: Any) -> bool:
        raise StoreUnavailable(where="the overflow", why="it is full", advice="")


@virtual
async def test_a_task_that_its_store_could_not_delay_goes_to_the_next_worker_of_its_type(tmp_path: Path) -> None:
    store = UndelayedStore(tmp_path / "spill.db")
    async with BackpressureSupervisor(overflow=store, lease=10.0) as supervisor:
        retry = Retry(max_attempts=3, base_delay=5.0)
        supervisor.register_worker("old", handler=FlakyHandler(1), task_types=["work"], retry=retry)
        ticket = await supervisor.submit(Task("work", 1, durable=True))
        await asyncio.sleep(0.01)
        await supervisor.unregister_worker("old")
        await asyncio.sleep(60.0)
        supervisor.register_worker("new", handler=Agent(1.0), task_types=["work"])
        async with asyncio.timeout(60.0):
            assert (await ticket).worker_id == "new"


# --- with tenants and reserved slots ---------------------------------------------------------------------------------


@virtual
async def test_tasks_of_a_tenant_that_runs_as_much_as_it_may_end_with_the_last_worker_of_their_type() -> None:
    async with BackpressureSupervisor(tenants={"a": Tenant(max_running=1)}) as supervisor:
        supervisor.register_worker("other", handler=Agent(10.0), task_types=["else"])
        supervisor.register_worker("only", handler=Agent(), task_types=["work"])
        running = supervisor.submit_nowait(Task("else", tenant="a"))
        waiting = flood(supervisor, "work", 2, tenant="a")
        waiting.append(supervisor.submit_nowait(Task("work", tenant="a", thread_id="talk")))
        await supervisor.unregister_worker("only")
        async with asyncio.timeout(1.0):
            assert await statuses(waiting) == [FAILED] * 3
        assert supervisor.statistics().waiting == 0
        assert (await running).status is SUCCEEDED


@virtual
async def test_tasks_of_a_tenant_that_runs_as_much_as_it_may_end_with_the_failed_start_of_their_worker() -> None:
    async def fail() -> None:
        await asyncio.sleep(1.0)
        raise OSError

    handler = Handler(call=Agent(), start=fail)
    async with BackpressureSupervisor(tenants={"a": Tenant(max_running=1)}) as supervisor:
        supervisor.register_worker("other", handler=Agent(10.0), task_types=["else"])
        supervisor.submit_nowait(Task("else", tenant="a"))
        supervisor.register_worker("only", handler=SelfMade(handler), task_types=["work"])
        waiting = flood(supervisor, "work", 2, tenant="a")
        async with asyncio.timeout(5.0):
            assert await statuses(waiting) == [FAILED] * 2


class SelfMade:
    """An agent that says itself how it is run."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def __forebay_handler__(self) -> Handler:
        return self._handler


@pytest.mark.parametrize("overflow", [None, "memory://", "sqlite"])
@virtual
async def test_tenants_take_turns_again_once_their_type_is_resumed(overflow: str | None, tmp_path: Path) -> None:
    agent = Agent(1.0)
    url = f"sqlite:///{tmp_path}/spill.db" if overflow == "sqlite" else overflow
    async with BackpressureSupervisor(max_queue_size=4, overflow=url) as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"])
        supervisor.pause("work")
        payloads = [f"{tenant}{number}" for tenant in "ab" for number in range(2 if url is None else 20)]
        tickets = [await supervisor.submit(Task("work", payload, tenant=payload[0])) for payload in payloads]
        await asyncio.sleep(60.0)
        assert agent.started == []
        assert all(tickets)
        supervisor.resume("work")
        assert await statuses(tickets) == [SUCCEEDED] * len(tickets)
        assert now() <= 61.0 + len(tickets)
    assert sorted(agent.started[:4]) == ["a0", "a1", "b0", "b1"]


@pytest.mark.parametrize("overflow", ["memory://", "sqlite"])
@virtual
async def test_a_new_worker_serves_what_tenants_have_in_the_overflow_of_a_type_without_one(
    overflow: str, tmp_path: Path
) -> None:
    agent = Agent(1.0)
    url = f"sqlite:///{tmp_path}/spill.db" if overflow == "sqlite" else overflow
    async with BackpressureSupervisor(max_queue_size=1, overflow=url) as supervisor:
        supervisor.register_worker("old", handler=Agent(1.0), task_types=["work"])
        payloads = [f"{tenant}{number}" for tenant in "ab" for number in range(10)]
        tickets = [await supervisor.submit(Task("work", payload, tenant=payload[0])) for payload in payloads]
        supervisor.pause("work")  # else what waits in memory would fail once its last worker is gone
        await supervisor.unregister_worker("old")
        outside = supervisor.statistics().outside
        assert outside >= 15
        supervisor.register_worker("new", handler=agent, task_types=["work"])
        supervisor.resume("work")
        assert await statuses(tickets) == [SUCCEEDED] * 20
        assert supervisor.statistics().outside == 0
    turns = [payload[0] for payload in agent.started if payload not in {"a0", "a1"}]
    assert abs(turns[:8].count("a") - turns[:8].count("b")) <= 2


@virtual
async def test_reserved_slots_are_kept_whatever_the_size_of_their_worker() -> None:
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker(
            "worker", handler=Agent(10.0), task_types=["work"], max_concurrent=2, reserve=1
        )
        flood(supervisor, "work", 12)
        running = []
        for slots in (5, 1, 3):
            worker.resize(slots)
            await asyncio.sleep(10.5)
            running.append(worker.current_tasks)
        assert running == [4, 0, 2]
        assert (await supervisor.submit(Task("work", priority=Priority.CRITICAL))).status is TaskStatus.RUNNING


def test_a_worker_keeps_as_many_slots_as_it_reserves() -> None:
    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("worker", handler=Agent(), task_types=["work"], max_concurrent=4, reserve=2)
    with pytest.raises(InvalidSetting, match="at least the slots that it reserves, 2"):
        worker.resize(1)
    assert worker.max_concurrent == 4


@pytest.mark.parametrize("types", [1, 40])
@virtual
async def test_a_worker_with_reserved_slots_leaves_none_behind(types: int) -> None:
    names = [f"type{number}" for number in range(types)]
    async with BackpressureSupervisor(tenants={"a": 2}) as supervisor:
        supervisor.register_worker("old", handler=Agent(), task_types=names, max_concurrent=4, reserve=3)
        supervisor.register_worker("new", handler=Agent(10.0), task_types=names, max_concurrent=2)
        await supervisor.unregister_worker("old")
        tickets = [supervisor.submit_nowait(Task(names[0], tenant=tenant)) for tenant in "ab"]
        assert [ticket.status for ticket in tickets] == [TaskStatus.RUNNING] * 2

"""Starting, draining and closing; every ticket ends."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import (
    Agent,
    UncancellableHandler,
    approximately,
    error_of,
    flood,
    now,
    results,
    run_ready,
    statuses,
    submit_all,
    virtual,
)
from tests.support.task_stores import OVERFLOWS, StoreBackend, overflow_url

from forebay import BackpressureSupervisor, Priority, Task, TaskCancelled, TaskStatus, WorkerState
from forebay.adapters import Handler
from forebay.errors import AlreadyStarted, DrainInside, NotStarted, StillSpilled, SupervisorClosed

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


def make_supervisor(agent: Any, *, slots: int = 1, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**options)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=slots)
    return supervisor


# --- leaving ---------------------------------------------------------------------------------------------------------


@virtual
async def test_leaving_normally_drains() -> None:
    agent = Agent()
    async with make_supervisor(agent) as supervisor:
        tickets = flood(supervisor, "work", 5)
    assert now() == approximately(5.0)
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 5


@pytest.mark.parametrize("error", [ValueError, SystemExit, asyncio.CancelledError])
@virtual
async def test_leaving_by_an_error_stops_the_handlers_and_ends_every_ticket(error: type[BaseException]) -> None:
    agent = Agent(10.0)
    tickets = []
    raised = error()

    async def use() -> None:
        async with make_supervisor(agent) as supervisor:
            tickets.extend(flood(supervisor, "work", 5))
            await asyncio.sleep(1.0)
            raise raised

    assert await error_of(use()) is raised
    assert now() == approximately(1.0)
    assert agent.running == 0
    assert await statuses(tickets) == [TaskStatus.CANCELLED] * 5


@virtual
async def test_leaving_by_a_cancellation_stops_the_handlers_and_ends_every_ticket() -> None:
    agent = Agent(10.0)
    tickets = []

    async def use() -> None:
        async with make_supervisor(agent) as supervisor:
            tickets.extend(flood(supervisor, "work", 5))
            await asyncio.sleep(60.0)

    user = asyncio.ensure_future(use())
    await asyncio.sleep(1.0)
    user.cancel()
    assert isinstance(await error_of(user), asyncio.CancelledError)
    assert agent.running == 0
    assert await statuses(tickets) == [TaskStatus.CANCELLED] * 5


@virtual
async def test_a_cancellation_while_leaving_normally_cuts_the_draining_short() -> None:
    agent = Agent(10.0)
    tickets = []

    async def use() -> None:
        async with make_supervisor(agent) as supervisor:
            tickets.extend(flood(supervisor, "work", 5))

    user = asyncio.ensure_future(use())
    await asyncio.sleep(15.0)
    user.cancel()
    assert isinstance(await error_of(user), asyncio.CancelledError)
    assert now() == approximately(15.0)
    assert agent.running == 0
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] + [TaskStatus.CANCELLED] * 4


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("overflow", OVERFLOWS, ids=str)
@virtual
async def test_a_second_cancellation_while_closing_leaves_no_ticket_open(
    after: int, overflow: StoreBackend | None, tmp_path: Path
) -> None:
    url = overflow_url(overflow, tmp_path)
    supervisor = make_supervisor(UncancellableHandler(2.0), overflow=url, max_queue_size=4)
    await supervisor.start()
    tickets = [await supervisor.submit(Task("work")) for _ in range(9)]
    closing = asyncio.ensure_future(supervisor.close())
    await run_ready(after)
    closing.cancel()
    await asyncio.wait([closing])
    await supervisor.close()
    assert all(ticket.done() for ticket in tickets)
    assert supervisor.statistics().waiting == 0


# --- closing ---------------------------------------------------------------------------------------------------------


@virtual
async def test_closing_ends_what_waits_and_what_runs() -> None:
    agent = Agent(10.0)
    supervisor = make_supervisor(agent)
    await supervisor.start()
    tickets = flood(supervisor, "work", 3)
    await run_ready()
    await supervisor.close()
    assert now() == approximately(0.0)
    assert agent.finished == [0]
    for result in await results(tickets):
        assert (result.status, result.error) == (
            TaskStatus.CANCELLED,
            "the supervisor stopped before it was done",
        )


@virtual
async def test_closing_waits_a_bounded_time_for_a_handler_that_does_not_stop() -> None:
    supervisor = make_supervisor(UncancellableHandler(600.0), zombie_grace=3.0)
    await supervisor.start()
    (ticket,) = flood(supervisor, "work", 1)
    await run_ready()
    await supervisor.close()
    assert now() == approximately(3.0)
    assert (await ticket).status is TaskStatus.CANCELLED


@virtual
async def test_closing_twice_or_without_a_start_is_closing_once() -> None:
    await BackpressureSupervisor().close()
    supervisor = make_supervisor(Agent())
    await supervisor.start()
    await asyncio.gather(supervisor.close(), supervisor.close())
    await supervisor.close()


@virtual
async def test_a_supervisor_that_was_not_closed_does_not_start_again() -> None:
    supervisor = make_supervisor(Agent())
    starting = asyncio.ensure_future(supervisor.start())
    await asyncio.sleep(0)
    assert isinstance(await error_of(supervisor.start()), AlreadyStarted)
    await starting
    assert isinstance(await error_of(supervisor.start()), AlreadyStarted)
    await supervisor.drain()
    assert isinstance(await error_of(supervisor.start()), AlreadyStarted)
    await supervisor.close()


@virtual
async def test_a_start_that_failed_may_be_tried_again(tmp_path: Path) -> None:
    supervisor = make_supervisor(Agent(), overflow=f"sqlite:///{tmp_path}/not/there/spill.db")
    await error_of(supervisor.start())
    (tmp_path / "not" / "there").mkdir(parents=True)
    async with supervisor:
        assert await supervisor.run(Task("work", 7)) == 7


@virtual
async def test_a_worker_may_be_registered_while_the_supervisor_starts(tmp_path: Path) -> None:
    below = make_supervisor(Agent(), overflow=f"sqlite:///{tmp_path / 'spill.db'}")
    supervisor = make_supervisor(below)
    starting = asyncio.ensure_future(supervisor.start())
    await asyncio.sleep(0)
    assert not starting.done()
    supervisor.register_worker("late", handler=make_supervisor(Agent()), task_types=["work"])
    await starting
    started = now()
    assert await statuses(flood(supervisor, "work", 6)) == [TaskStatus.SUCCEEDED] * 6
    assert now() - started == approximately(3.0)  # both workers took three, one at a time
    await supervisor.close()


@virtual
async def test_a_supervisor_can_be_read_before_it_starts_and_after_it_closes() -> None:
    supervisor = make_supervisor(Agent())
    assert supervisor.system_load() == 0.0
    assert supervisor.utilization() == 0.0
    assert supervisor.statistics().submitted == 0
    async with supervisor:
        ticket = await supervisor.submit(Task("work", task_id="t"))
    assert supervisor.statistics().succeeded == 1
    assert supervisor.ticket("t") is ticket
    assert (await ticket).success


@virtual
async def test_cancelling_a_start_leaves_nothing_open(tmp_path: Path) -> None:
    for after in range(8):
        supervisor = make_supervisor(Agent(), overflow=f"sqlite:///{tmp_path}/spill.db")
        starting = asyncio.ensure_future(supervisor.start())
        await run_ready(after)
        starting.cancel()
        await asyncio.wait([starting])
        if starting.cancelled():
            await supervisor.start()
        assert await supervisor.run(Task("work", 7)) == 7
        await supervisor.close()


class StartingHandler:
    """An agent that takes a second to start, or never starts, or fails to."""

    def __init__(self, agent: Any, *, seconds: float = 1.0, failures: int = 0) -> None:
        self.agent = agent
        self.seconds = seconds
        self.failures = failures
        self.calls: list[str] = []

    def __forebay_handler__(self) -> Handler:
        return Handler(call=self.agent, start=self.start, stop=self.stop)

    async def start(self) -> None:
        self.calls.append("start")
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.calls.append("cancelled")
            raise
        if self.failures:
            self.failures -= 1
            raise SystemExit(1)
        self.calls.append("started")

    async def stop(self) -> None:
        self.calls.append("stop")


@pytest.mark.parametrize("overflow", [None, "sqlite"])
@virtual
async def test_closing_undoes_a_start_in_progress(overflow: str | None, tmp_path: Path) -> None:
    first, second = StartingHandler(Agent(), seconds=0.0), StartingHandler(Agent(), seconds=1000.0)
    url = None if overflow is None else f"sqlite:///{tmp_path}/spill.db"
    supervisor = BackpressureSupervisor(overflow=url)
    supervisor.register_worker("first", handler=first, task_types=["work"])
    supervisor.register_worker("second", handler=second, task_types=["work"])
    starting = asyncio.ensure_future(supervisor.start())
    await asyncio.sleep(1.0)
    await asyncio.gather(supervisor.close(), supervisor.close())
    assert isinstance(await error_of(starting), SupervisorClosed)
    assert now() < 2.0
    assert (first.calls, second.calls) == (["start", "started", "stop"], ["start", "cancelled"])
    second.seconds = 0.0
    async with supervisor:
        assert second.calls[-1] == "started"
        assert await supervisor.run(Task("work", 1.0)) == 1.0


@virtual
async def test_closing_in_the_turn_in_which_a_start_ends_leaves_nothing_open() -> None:
    for turns in range(1, 8):
        handler = StartingHandler(Agent(), seconds=0.0)
        supervisor = BackpressureSupervisor()
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        starting = asyncio.ensure_future(supervisor.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        await supervisor.close()
        outcome = (await asyncio.gather(starting, return_exceptions=True))[0]
        assert outcome is None or isinstance(outcome, SupervisorClosed)
        assert "started" not in handler.calls or handler.calls[-1] == "stop"
        assert supervisor.loop is None


@virtual
async def test_a_start_cancelled_in_the_turn_in_which_it_ends_leaves_nothing_open() -> None:
    for turns in range(1, 8):
        handler = StartingHandler(Agent(), seconds=0.0)
        supervisor = BackpressureSupervisor()
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        starting = asyncio.ensure_future(supervisor.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        if starting.cancel():
            assert isinstance(await error_of(starting), asyncio.CancelledError)
            assert "started" not in handler.calls or handler.calls[-1] == "stop"
        await supervisor.close()


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with 3.12")
def test_with_eager_tasks_a_worker_that_a_start_registers_is_registered_once() -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
        supervisor = BackpressureSupervisor()
        second = StartingHandler(Agent(0.0), seconds=0.0)

        class Registering(StartingHandler):
            async def start(self) -> None:
                supervisor.register_worker("second", handler=second, task_types=["more"])

        supervisor.register_worker("first", handler=Registering(Agent(0.0)), task_types=["work"])
        async with supervisor:
            assert await supervisor.run(Task("more", 1)) == 1
        assert second.calls == ["start", "started", "stop"]

    asyncio.run(main())


@virtual
async def test_a_worker_registered_after_the_start_takes_no_task_before_its_handler_has_started() -> None:
    agent = Agent(1.0)
    handler = StartingHandler(agent, seconds=5.0)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
        tickets = flood(supervisor, "work", 2)
        await asyncio.sleep(1.0)
        assert (worker.state, worker.current_tasks) == (WorkerState.IDLE, 0)
        assert [result.status for result in await results(tickets)] == [TaskStatus.SUCCEEDED] * 2
        assert now() == approximately(6.0)


@pytest.mark.parametrize("reset_timeout", [10.0, None])
@virtual
async def test_a_worker_whose_start_fails_is_failed_until_it_starts(
    reset_timeout: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    agent = Agent(1.0)
    handler = StartingHandler(agent, failures=1)
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], reset_timeout=reset_timeout)
        waiting = flood(supervisor, "work", 2, thread_id="one")
        failed = await results(waiting)  # there is no other worker to wait for
        assert [(result.status, result.error) for result in failed] == [(TaskStatus.FAILED, "SystemExit: 1")] * 2
        assert all(isinstance(result.cause, SystemExit) for result in failed)
        assert now() == approximately(1.0)
        assert worker.state is WorkerState.FAILED
        assert not supervisor.submit_nowait(Task("work"))
        if reset_timeout is None:
            await asyncio.sleep(1000.0)
            assert handler.calls == ["start"]
            worker.revive()
            worker.revive()
        else:
            await asyncio.sleep(reset_timeout)
        assert await supervisor.run(Task("work", 7)) == 7
        assert handler.calls == ["start", "start", "started"]
        assert worker.state.value == "idle"
    assert "start of worker 'worker' raised SystemExit" in caplog.text


@virtual
async def test_a_task_waits_for_another_worker_if_one_cannot_be_started() -> None:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("good", handler=Agent(10.0), task_types=["work"])
        first, second = flood(supervisor, "work", 2)
        supervisor.register_worker("bad", handler=StartingHandler(Agent(), failures=9), task_types=["work"])
        assert [result.worker_id for result in await results([first, second])] == ["good", "good"]


@virtual
async def test_a_start_that_fails_for_good_leaves_no_task_waiting() -> None:
    async with BackpressureSupervisor() as supervisor:
        handler = StartingHandler(Agent(), failures=1000)
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        tickets = []
        for _ in range(200):
            tickets += flood(supervisor, "work", 1)
            await asyncio.sleep(1.0)
        assert 3 <= handler.calls.count("start") <= 20
        assert all(ticket.status is TaskStatus.FAILED for ticket in tickets[:100] if ticket)
        await supervisor.drain()


@pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own
@virtual
async def test_a_stored_task_that_waits_for_a_start_that_fails_runs_after_the_next_one(tmp_path: Path) -> None:
    agent = Agent(1.0)
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        supervisor.register_worker("worker", handler=StartingHandler(agent, failures=1), task_types=["work"])
        ticket = await supervisor.submit(Task("work", "durable", durable=True))
        assert (await ticket).result == "durable"
        assert agent.started == ["durable"]


@virtual
async def test_closing_cancels_the_start_of_a_worker_that_was_registered_after_the_start() -> None:
    handler = StartingHandler(Agent(), seconds=1000.0)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"])
        (waiting,) = flood(supervisor, "work", 1)
        await asyncio.sleep(1.0)
        await supervisor.close()
        assert now() == approximately(1.0)
    assert waiting.status is TaskStatus.CANCELLED
    assert handler.calls == ["start", "cancelled", "stop"]


@virtual
async def test_a_handler_may_close_its_own_supervisor() -> None:
    async def closes(_: Task) -> None:
        await supervisor.close()

    supervisor = make_supervisor(closes)
    await supervisor.start()
    tickets = flood(supervisor, "work", 3)
    assert await statuses(tickets) == [TaskStatus.CANCELLED] * 3
    await supervisor.close()


# --- draining --------------------------------------------------------------------------------------------------------


@virtual
async def test_draining_lets_the_tasks_inside_finish_and_reports_them() -> None:
    async with make_supervisor(Agent()) as supervisor:
        tickets = flood(supervisor, "work", 4)
        report = await supervisor.drain()
        assert now() == approximately(4.0)
    assert (report.finished, report.spilled, report.cancelled, report.orphans) == (4, 0, 0, ())
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 4


@virtual
async def test_draining_an_empty_supervisor_takes_no_time() -> None:
    async with make_supervisor(Agent()) as supervisor:
        report = await supervisor.drain()
        assert now() == 0.0
    assert (report.finished, report.cancelled) == (0, 0)


@virtual
async def test_draining_cancels_what_is_left_at_the_timeout() -> None:
    agent = Agent(2.0)
    async with make_supervisor(agent) as supervisor:
        tickets = flood(supervisor, "work", 5)
        report = await supervisor.drain(timeout=5.0)
        assert now() == approximately(5.0)
        assert agent.running == 0
    assert (report.finished, report.spilled, report.cancelled, report.orphans) == (2, 0, 3, ())
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 2 + [TaskStatus.CANCELLED] * 3


@virtual
async def test_draining_reports_handlers_that_do_not_stop_as_orphans() -> None:
    async with make_supervisor(UncancellableHandler(600.0), slots=2, zombie_grace=3.0) as supervisor:
        ticket = supervisor.submit_nowait(Task("work", task_id="stubborn"))
        report = await supervisor.drain(timeout=1.0)
        assert now() == approximately(4.0)
    assert (report.finished, report.cancelled, report.orphans) == (0, 0, ("stubborn",))
    assert (await ticket).status is TaskStatus.CANCELLED


@virtual
async def test_while_draining_nothing_more_is_admitted() -> None:
    async with make_supervisor(Agent()) as supervisor:
        flood(supervisor, "work", 1)
        draining = asyncio.ensure_future(supervisor.drain())
        await run_ready()
        with pytest.raises(SupervisorClosed, match="draining"):
            supervisor.submit_nowait(Task("work"))
        await draining


@virtual
async def test_running_tasks_may_still_submit_while_draining() -> None:
    async def parent(_: Task) -> Any:
        await asyncio.sleep(1.0)
        return await supervisor.run(Task("child", 7))

    supervisor = make_supervisor(parent)
    supervisor.register_worker("children", handler=Agent(), task_types=["child"])
    async with supervisor:
        (ticket,) = flood(supervisor, "work", 1)
    assert (await ticket).result == 7


@pytest.mark.parametrize("ignores_cancellation", [False, True])
@virtual
async def test_a_stop_that_does_not_return_does_not_keep_a_supervisor_from_closing(
    caplog: pytest.LogCaptureFixture, *, ignores_cancellation: bool
) -> None:
    give_up = asyncio.Event()
    stopped: list[str] = []

    class Service:
        def __init__(self, name: str) -> None:
            self.name = name

        def __forebay_handler__(self) -> Handler:
            return Handler(call=Agent(), stop=self.stop)

        async def stop(self) -> None:
            while self.name == "second" and not give_up.is_set():
                with contextlib.suppress(*[asyncio.CancelledError] * ignores_cancellation):
                    await give_up.wait()
            stopped.append(self.name)

    supervisor = BackpressureSupervisor()
    for name in ("first", "second"):
        supervisor.register_worker(name, handler=Service(name), task_types=["work"])
    await supervisor.start()
    began = now()
    await supervisor.close()
    assert now() - began == approximately(10.0)
    assert stopped == ["first"]
    assert "stop of worker 'second' has not returned" in caplog.text
    give_up.set()
    await run_ready()


@virtual
async def test_a_task_that_a_handler_submits_when_it_is_stopped_is_stopped_too() -> None:
    children = Agent(600.0)

    async def submits_on_cancellation(_: Task) -> None:
        try:
            await asyncio.sleep(600.0)
        except asyncio.CancelledError:
            await supervisor.run(Task("child"))

    supervisor = make_supervisor(submits_on_cancellation, zombie_grace=2.0)
    supervisor.register_worker("children", handler=children, task_types=["child"])
    async with supervisor:
        (ticket,) = flood(supervisor, "work", 1)
        await run_ready()
        report = await supervisor.drain(timeout=1.0)
        assert now() == approximately(3.0)
        assert (children.running, supervisor.statistics().running) == (0, 0)
    assert (report.finished, report.orphans) == (0, ())
    assert (await ticket).status is TaskStatus.CANCELLED


@virtual
async def test_draining_from_inside_a_task_is_an_error() -> None:
    async def drains(_: Task) -> None:
        await supervisor.drain()

    supervisor = make_supervisor(drains)
    async with supervisor:
        result = await supervisor.submit_nowait(Task("work"))
    assert isinstance(result.cause, DrainInside)


@virtual
async def test_draining_twice_is_draining_once_also_at_the_same_time() -> None:
    async with make_supervisor(Agent(10.0)) as supervisor:
        flood(supervisor, "work", 1)
        first = asyncio.ensure_future(supervisor.drain())
        await run_ready()
        second = asyncio.ensure_future(supervisor.drain())
        reports = await asyncio.gather(first, second)
        assert [report.finished for report in reports] == [1, 1]
        assert now() == approximately(10.0)
        assert (await supervisor.drain()).finished == 0


@virtual
async def test_closing_ends_a_drain_in_progress() -> None:
    supervisor = make_supervisor(Agent(10.0))
    await supervisor.start()
    flood(supervisor, "work", 2)
    draining = asyncio.ensure_future(supervisor.drain())
    await asyncio.sleep(1.0)
    await supervisor.close()
    await draining
    assert now() == approximately(1.0)


@virtual
async def test_a_cancelled_drain_leaves_the_supervisor_draining_and_may_be_repeated() -> None:
    agent = Agent(10.0)
    async with make_supervisor(agent) as supervisor:
        tickets = flood(supervisor, "work", 2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await supervisor.drain()
        assert agent.running == 1
        assert (await supervisor.drain()).finished == 2
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 2


@virtual
async def test_draining_waits_for_tasks_that_wait_for_their_thread() -> None:
    async with make_supervisor(Agent(), slots=5) as supervisor:
        tickets = flood(supervisor, "work", 4, thread_id="alice")
        assert (await supervisor.drain()).finished == 4
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 4


@virtual
async def test_draining_does_not_wait_for_a_task_that_no_worker_will_take() -> None:
    agent = Agent(0.1, error=ValueError())
    supervisor = BackpressureSupervisor(backpressure_threshold=1)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=None)
    async with supervisor:
        tickets = flood(supervisor, "work", 8)
        report = await supervisor.drain()
    assert (report.finished, report.cancelled) == (5, 3)
    assert await statuses(tickets) == [TaskStatus.FAILED] * 5 + [TaskStatus.CANCELLED] * 3


@virtual
async def test_draining_does_not_wait_for_a_zombie_that_blocks_the_last_worker() -> None:
    supervisor = BackpressureSupervisor(zombie_grace=1.0)
    supervisor.register_worker(
        "worker", handler=UncancellableHandler(20.0), task_types=["work"], reset_timeout=None, timeout=1.0
    )
    async with supervisor:
        tickets = flood(supervisor, "work", 2)
        await asyncio.sleep(3.0)
        await supervisor.drain()
        assert now() == approximately(3.0 + 1.0)
    assert await statuses(tickets) == [TaskStatus.TIMED_OUT, TaskStatus.CANCELLED]


@virtual
async def test_draining_waits_for_a_failed_worker_that_will_be_tried_again() -> None:
    agent = Agent(0.1, error=ValueError())
    supervisor = BackpressureSupervisor(backpressure_threshold=1)
    supervisor.register_worker("worker", handler=agent, task_types=["work"], reset_timeout=10.0)
    async with supervisor:
        tickets = flood(supervisor, "work", 8)
        await results(tickets[:5])
        agent.error = None
    assert await statuses(tickets[5:]) == [TaskStatus.SUCCEEDED] * 3


# --- with an overflow ------------------------------------------------------------------------------------------------


@virtual
async def test_draining_spills_waiting_tasks_to_a_durable_overflow(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    async with make_supervisor(Agent(), overflow=url) as supervisor:
        tickets = flood(supervisor, "work", 6)
        report = await supervisor.drain()
        assert (report.finished, report.spilled) == (1, 5)
    for ticket in tickets[1:]:
        assert isinstance(await error_of(ticket), StillSpilled)
    agent = Agent()
    async with make_supervisor(agent, overflow=url) as supervisor:
        await asyncio.sleep(6.0)
    assert agent.started == [1, 2, 3, 4, 5]


@virtual
async def test_waiters_for_spilled_tasks_get_still_spilled_when_draining_starts(tmp_path: Path) -> None:
    async with make_supervisor(Agent(10.0), overflow=f"sqlite:///{tmp_path}/spill.db", max_queue_size=0) as supervisor:
        _, spilled = await submit_all(supervisor, [Task("work", n) for n in range(2)])
        waiting = asyncio.ensure_future(error_of(spilled))
        await asyncio.sleep(1.0)
        draining = asyncio.ensure_future(supervisor.drain())
        assert isinstance(await waiting, StillSpilled)
        assert now() == pytest.approx(1.0, abs=0.1)
        assert not spilled.cancel()
        assert (await draining).finished == 1


class NestingHandler:
    """A handler whose parent tasks run a child of the same type; `started` is that of an Agent."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.supervisor: BackpressureSupervisor | None = None

    async def __call__(self, task: Task) -> Any:
        self.started.append(task.payload)
        await asyncio.sleep(1.0)
        assert self.supervisor is not None
        return await self.supervisor.run(Task("work", "child")) if task.payload == "parent" else task.payload


@pytest.mark.parametrize("durable", [False, True])
@virtual
async def test_draining_does_not_wait_for_a_run_that_waits_for_a_spilled_task(tmp_path: Path, *, durable: bool) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    handler = NestingHandler()
    async with make_supervisor(handler, overflow=url, max_queue_size=0) as supervisor:
        handler.supervisor = supervisor
        parent = await supervisor.submit(Task("work", "parent", durable=durable))
        other = await supervisor.submit(Task("work", "other", priority=Priority.CRITICAL))
        await asyncio.sleep(1.5)  # the child is spilled, and the other task has the parent's slot
        await supervisor.drain()
        assert now() == pytest.approx(2.0, abs=0.1)
    if durable:  # it runs again if its child has run
        assert isinstance(await error_of(parent), StillSpilled)
    else:
        result = await parent
        assert result.status is TaskStatus.FAILED
        assert isinstance(result.cause, StillSpilled)
    assert (await other).result == "other"
    handler.started.clear()
    async with make_supervisor(handler, overflow=url, slots=3) as supervisor:
        handler.supervisor = supervisor
        await asyncio.sleep(5.0)
        assert sorted(handler.started) == (["child", "child", "parent"] if durable else ["child"])


@virtual
async def test_draining_does_not_spill_a_task_that_a_run_may_wait_for(tmp_path: Path) -> None:
    handler = NestingHandler()
    async with make_supervisor(handler, overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        handler.supervisor = supervisor
        parent = supervisor.submit_nowait(Task("work", "parent"))
        other = supervisor.submit_nowait(Task("work", "other", priority=Priority.HIGH))
        await asyncio.sleep(1.5)  # the child waits in the queue behind the other task
        assert (await supervisor.drain()).finished == 3
    assert (await parent).result == "child"
    assert (await other).success


@virtual
async def test_draining_does_not_spill_a_task_that_may_not_spill(tmp_path: Path) -> None:
    async with make_supervisor(Agent(), overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        tickets = flood(supervisor, "work", 4, spill=False)
        assert (await supervisor.drain()).finished == 4
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 4


@virtual
async def test_draining_runs_what_is_in_an_overflow_that_is_not_durable() -> None:
    async with make_supervisor(Agent(), overflow="memory://", max_queue_size=2) as supervisor:
        tickets = [await supervisor.submit(Task("work", n)) for n in range(10)]
    assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 10


@virtual
async def test_closing_ends_what_is_in_an_overflow_that_is_not_durable() -> None:
    supervisor = make_supervisor(Agent(), overflow="memory://", max_queue_size=2)
    await supervisor.start()
    tickets = [await supervisor.submit(Task("work", n)) for n in range(10)]
    await supervisor.close()
    assert await statuses(tickets) == [TaskStatus.CANCELLED] * 10


@pytest.mark.parametrize("durable", [False, True])
@virtual
async def test_a_task_being_spilled_when_draining_starts_is_spilled_once(tmp_path: Path, *, durable: bool) -> None:
    for moment in range(0, 60, 4):
        url = f"sqlite:///{tmp_path}/{moment}.db?fsync=no"
        first, second = Agent(), Agent()
        async with make_supervisor(first, overflow=url, max_queue_size=0) as supervisor:
            flood(supervisor, "work", 1)
            submitting = asyncio.ensure_future(supervisor.submit(Task("work", "mine", durable=durable)))
            await asyncio.sleep(moment * 0.0001)
            await supervisor.drain()
        assert isinstance(await error_of((await submitting).value()), StillSpilled)
        async with make_supervisor(second, overflow=url):
            await asyncio.sleep(3.0)
        assert [*first.started, *second.started] == [0, "mine"]


@pytest.mark.parametrize("drained_at", [0.0005, 0.9995, 1.0015, 1.003, 1.006])
@virtual
async def test_a_task_cancelled_while_it_is_spilled_by_draining_ends_cancelled(
    drained_at: float, tmp_path: Path
) -> None:
    for moment in range(24):
        url = f"sqlite:///{tmp_path}/{moment}.db?fsync=no"
        first, second = Agent(), Agent()
        async with make_supervisor(first, overflow=url, max_queue_size=2) as supervisor:
            tickets = await submit_all(supervisor, [Task("work", n, durable=n % 2 == 1) for n in range(6)])
            origin = now()
            await asyncio.sleep(drained_at)
            draining = asyncio.ensure_future(supervisor.drain())
            await asyncio.sleep(moment * 0.0005)
            for ticket in tickets[1:]:
                ticket.cancel()
            await draining
            assert now() - origin < 4.0
        async with make_supervisor(second, overflow=url, slots=9):
            await asyncio.sleep(2.0)
        for number, ticket in enumerate(tickets):
            runs = (number in first.finished, number in second.started)
            if isinstance(error := await error_of(ticket.value()) if number else None, StillSpilled):
                assert runs == (False, True)
            elif error is not None:
                assert isinstance(error, TaskCancelled)
                assert not runs[1]


@virtual
async def test_a_cancelled_drain_loses_no_task_that_is_being_spilled(tmp_path: Path) -> None:
    for after in range(0, 40, 3):
        url = f"sqlite:///{tmp_path}/{after}.db"
        supervisor = make_supervisor(Agent(), overflow=url)
        await supervisor.start()
        tickets = flood(supervisor, "work", 5)
        draining = asyncio.ensure_future(supervisor.drain())
        await asyncio.sleep(after * 0.0005)
        draining.cancel()
        await asyncio.wait([draining])
        await supervisor.close()
        kept = [isinstance(await error_of(ticket.value()), StillSpilled) for ticket in tickets]
        agent = Agent(0.1)
        async with make_supervisor(agent, overflow=url) as supervisor:
            await asyncio.sleep(2.0)
        assert sorted(agent.started) == [n for n in range(5) if kept[n]]


class EndlessStart:
    """A handler whose start does not end, whatever happens, until it is told to."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()

    def __forebay_handler__(self) -> Handler:
        async def start() -> None:
            while not self.goes_on.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.goes_on.wait()

        return Handler(call=Agent(), start=start)


@virtual
async def test_a_supervisor_that_is_starting_takes_no_tasks_and_closes_within_a_bound() -> None:
    handler = EndlessStart()
    supervisor = BackpressureSupervisor(zombie_grace=1.0)
    supervisor.register_worker("w", handler=handler, task_types=["work"])
    starting = asyncio.ensure_future(supervisor.start())
    await asyncio.sleep(0.1)
    with pytest.raises(NotStarted):
        await supervisor.submit(Task("work"))
    await supervisor.close()
    assert now() == approximately(0.1 + 10.0)
    handler.goes_on.set()
    with pytest.raises(SupervisorClosed):
        await starting

"""A closed supervisor starts again: with its workers and settings, and nothing else of its earlier run."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import Agent, UncancellableHandler, error_of, flood, now, run_ready, statuses, virtual

from forebay import BackpressureSupervisor, Priority, Task, TaskStatus, Upstream, WorkerState
from forebay.adapters import Handler
from forebay.errors import AlreadyStarted, StillSpilled, SupervisorClosed, TaskFailed, UnknownTask, WrongLoop
from forebay.events import Event, TaskFinished
from forebay.overflow import MemoryTaskStore, SqliteTaskStore

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


class Service:
    """A handler with a start and a stop, which writes down both."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __forebay_handler__(self) -> Handler:
        return Handler(call=Agent(), start=self.start, stop=self.stop)

    async def start(self) -> None:
        await asyncio.sleep(0.1)
        self.calls.append("start")

    async def stop(self) -> None:
        await asyncio.sleep(0.1)
        self.calls.append("stop")


def make_supervisor(handler: Any, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(**options)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
    return supervisor


@virtual
async def test_hooks_are_called_again_and_what_was_counted_is_forgotten() -> None:
    service = Service()
    supervisor = make_supervisor(service)
    for run in (1, 2, 3):
        async with supervisor:
            assert supervisor.statistics().submitted == 0
            assert supervisor.workers["worker"].avg_duration_ms == 0.0
            assert await statuses(flood(supervisor, "work", 3)) == [TaskStatus.SUCCEEDED] * 3
            assert supervisor.statistics().succeeded == 3
        assert supervisor.statistics().succeeded == 3  # until the next start
        assert service.calls == ["start", "stop"] * run


@virtual
async def test_a_start_while_it_closes_waits_for_the_close() -> None:
    supervisor = make_supervisor(Agent(10.0), zombie_grace=3.0)
    supervisor.register_worker("stubborn", handler=UncancellableHandler(600.0), task_types=["hang"])
    await supervisor.start()
    flood(supervisor, "hang", 1)
    await run_ready()
    closing = asyncio.ensure_future(supervisor.close())
    await run_ready(1)
    starts = [asyncio.ensure_future(supervisor.start()) for _ in range(3)]
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    assert closing.done()
    assert now() == pytest.approx(3.0, abs=0.01)
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, AlreadyStarted) for outcome in outcomes) == 2
    assert await supervisor.run(Task("work", 1.0)) == 1.0
    await supervisor.close()


@virtual
async def test_a_handler_that_outlived_the_close_has_no_slot_in_the_next_run() -> None:
    hanging = UncancellableHandler(100.0)
    supervisor = make_supervisor(hanging, zombie_grace=1.0)
    worker = supervisor.workers["worker"]
    await supervisor.start()
    old = flood(supervisor, "work", 2)
    await run_ready()
    await supervisor.close()
    assert await statuses(old) == [TaskStatus.CANCELLED] * 2
    assert worker.zombies == 2
    async with supervisor:
        assert (worker.state, worker.current_tasks, worker.zombies) == (WorkerState.IDLE, 0, 0)
        tickets = flood(supervisor, "work", 2)
        await asyncio.sleep(99.5)  # the old handlers end meanwhile, and the new ones have not
        assert hanging.running == 2
        assert worker.current_tasks == 2
        assert await statuses(tickets) == [TaskStatus.SUCCEEDED] * 2
        assert worker.current_tasks == worker.zombies == 0


@virtual
async def test_a_handler_that_outlived_the_close_counts_until_it_stops() -> None:
    supervisor = make_supervisor(UncancellableHandler(100.0), zombie_grace=1.0)
    worker = supervisor.workers["worker"]
    await supervisor.start()
    flood(supervisor, "work", 2)
    await run_ready()
    await supervisor.close()
    assert (worker.current_tasks, worker.zombies) == (2, 2)
    await asyncio.sleep(100.0)
    assert (worker.current_tasks, worker.zombies) == (0, 0)


@virtual
async def test_the_reserve_of_a_worker_counts_no_orphans() -> None:
    hanging = UncancellableHandler(10.0)
    supervisor = BackpressureSupervisor(zombie_grace=1.0)
    supervisor.register_worker("worker", handler=hanging, task_types=["work"], max_concurrent=3, reserve=1)
    await supervisor.start()
    flood(supervisor, "work", 3, priority=Priority.HIGH)
    await run_ready()
    await supervisor.close()
    async with supervisor:
        normal = flood(supervisor, "work", 3)
        await asyncio.sleep(9.5)  # the old handlers end meanwhile
        assert [ticket.status for ticket in normal] == [TaskStatus.RUNNING] * 2 + [TaskStatus.WAITING]
        high = supervisor.submit_nowait(Task("work", priority=Priority.HIGH))
        await run_ready()
        assert high.status is TaskStatus.RUNNING
        assert await statuses([*normal, high]) == [TaskStatus.SUCCEEDED] * 4


@virtual
async def test_an_orphan_that_uses_the_supervisor_after_the_restart_lends_no_slot() -> None:
    go = asyncio.Event()
    seen: list[Any] = []

    async def orphan(_: Task) -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        seen.append(await supervisor.run(Task("work", 1.0)))

    supervisor = BackpressureSupervisor(zombie_grace=1.0)
    supervisor.register_worker("orphan", handler=orphan, task_types=["orphan"])
    supervisor.register_worker("worker", handler=Agent(), task_types=["work"])
    await supervisor.start()
    flood(supervisor, "orphan", 1)
    await run_ready()
    await supervisor.close()
    async with supervisor:
        go.set()
        await asyncio.sleep(5.0)
        assert seen == [1.0]
        assert all(worker.current_tasks == worker.suspended == 0 for worker in supervisor.workers.values())
        assert all(worker.slots == 1 for worker in supervisor.workers.values())


@virtual
async def test_a_failed_worker_begins_the_next_run_with_its_breaker_closed() -> None:
    broken = True

    async def handler(_: Task) -> str:
        if broken:
            raise ValueError
        return "well"

    supervisor = BackpressureSupervisor()
    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], reset_timeout=None)
    async with supervisor:
        for _ in range(5):
            assert isinstance(await error_of(supervisor.run(Task("work"))), TaskFailed)
        assert worker.state is WorkerState.FAILED
    broken = False
    async with supervisor:
        assert (worker.state, worker.failed) == (WorkerState.IDLE, False)
        assert await supervisor.run(Task("work")) == "well"


@virtual
async def test_old_tickets_keep_their_results_and_their_ids_are_free() -> None:
    supervisor = make_supervisor(Agent())
    async with supervisor:
        old = await supervisor.submit(Task("work", 1, task_id="a", key="k"))
    async with supervisor:
        assert (await old).result == 1
        assert not old.cancel()
        with pytest.raises(UnknownTask):
            supervisor.ticket("a")
        assert await supervisor.find(key="k") is None
        assert await supervisor.run(Task("work", 2, task_id="a", key="k")) == 2


@virtual
async def test_sinks_stay_and_subscriptions_end_with_their_run() -> None:
    events: list[Event] = []
    supervisor = make_supervisor(Agent(), on_event=events.append)
    async with supervisor:
        first = supervisor.events()
        await supervisor.run(Task("work", 1))
    seen = [event async for event in first]
    assert [type(event).__name__ for event in seen] == ["TaskSubmitted", "TaskStarted", "TaskFinished"]
    assert events == seen
    async with supervisor:
        second = supervisor.events()
        await supervisor.run(Task("work", 2))
    assert [event async for event in first] == []
    finished = [event async for event in second if isinstance(event, TaskFinished)]
    assert [event.result.result for event in finished] == [2]
    assert len(events) == 6


@virtual
async def test_a_worker_may_be_registered_between_two_runs() -> None:
    supervisor = make_supervisor(Agent())
    async with supervisor:
        pass
    service = Service()
    supervisor.register_worker("late", handler=service, task_types=["late"])
    assert service.calls == []
    async with supervisor:
        assert await supervisor.run(Task("late", 1.0)) == 1.0
    assert service.calls == ["start", "stop"]


@virtual
async def test_a_nested_supervisor_starts_again_with_the_one_above_it() -> None:
    below = make_supervisor(Agent())
    above = BackpressureSupervisor()
    above.register_worker("below", handler=below, task_types=["work"], max_concurrent=2)
    for _ in range(2):
        async with above:
            assert await statuses(flood(above, "work", 2)) == [TaskStatus.SUCCEEDED] * 2
            assert below.statistics().succeeded == 2
        assert isinstance(await error_of(below.submit(Task("work"))), SupervisorClosed)


@virtual
async def test_an_upstream_of_the_earlier_run_neither_leaks_nor_blocks() -> None:
    upstream = Upstream("search", max_concurrent=1)

    async def handler(_: Task) -> None:
        async with upstream.call():
            await asyncio.sleep(1.0)

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("a", handler=handler, task_types=["a"], max_concurrent=4, upstreams=[upstream])
    for _ in range(3):
        await supervisor.start()
        flood(supervisor, "a", 8)
        await asyncio.sleep(2.5)
        await supervisor.close()
        assert all(account.in_flight == account.expected_calls == 0 for account in upstream.statistics().accounts)
    async with supervisor:
        assert await statuses(flood(supervisor, "a", 8)) == [TaskStatus.SUCCEEDED] * 8


# --- overflows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["url", "store"])
@virtual
async def test_a_durable_overflow_is_opened_again_and_what_it_has_runs(given: str, tmp_path: Path) -> None:
    path = tmp_path / "spill.db"
    overflow = f"sqlite:///{path}" if given == "url" else SqliteTaskStore(path)
    supervisor = make_supervisor(Agent(), overflow=overflow, max_queue_size=0)
    async with supervisor:
        tickets = [await supervisor.submit(Task("work", number, task_id=f"{number}")) for number in range(6)]
    left = [ticket for ticket in tickets if ticket.result is None]
    assert len(left) == 4
    assert all([isinstance(await error_of(ticket), StillSpilled) for ticket in left])
    async with supervisor:
        for ticket in left:
            found = await supervisor.find(ticket.task_id)
            assert found is not None
            assert (await found).result == int(ticket.task_id)


@pytest.mark.parametrize("given", ["url", "store"])
@virtual
async def test_what_was_in_memory_does_not_run_again(given: str) -> None:
    agent = Agent(10.0)
    supervisor = make_supervisor(agent, overflow="memory://" if given == "url" else MemoryTaskStore(), max_queue_size=0)
    await supervisor.start()
    tickets = [await supervisor.submit(Task("work", number, task_id=f"{number}")) for number in range(6)]
    await run_ready()
    await supervisor.close()
    assert await statuses(tickets) == [TaskStatus.CANCELLED] * 6
    started = len(agent.started)
    async with supervisor:
        await asyncio.sleep(60.0)
        assert supervisor.statistics().refilled == 0
        assert len(agent.started) == started
        assert (await (await supervisor.submit(Task("work", 1.0, task_id="5")))).success


# --- real event loops ------------------------------------------------------------------------------------------------


def echo(task: Task) -> Any:
    return task.payload


async def echo_later(task: Task) -> Any:
    await asyncio.sleep(0)
    return task.payload


@pytest.mark.parametrize("engine", ["loop", "thread", "process"])
def test_it_starts_again_on_another_event_loop(engine: str, tmp_path: Path) -> None:
    handler = echo_later if engine == "loop" else echo
    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db", max_queue_size=3, lag_bound=0.5)
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2, engine=engine)

    async def use() -> list[Any]:
        async with supervisor:
            tickets = [await supervisor.submit(Task("work", number)) for number in range(12)]
            return [await ticket.value() for ticket in tickets]

    threads = set(threading.enumerate())
    for _ in range(3):
        assert asyncio.run(use()) == list(range(12))
    for thread in set(threading.enumerate()) - threads:
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.mark.parametrize("overflow", [None, "store"])
def test_a_run_that_was_cut_off_with_its_loop_is_no_obstacle(overflow: str | None, tmp_path: Path) -> None:
    supervisor = make_supervisor(echo_later, overflow=overflow and SqliteTaskStore(tmp_path / "spill.db"))

    async def cut_off() -> None:
        await supervisor.start()
        flood(supervisor, "work", 3)
        asyncio.ensure_future(supervisor.close())  # noqa: RUF006 - the loop ends before it
        await asyncio.sleep(0)

    asyncio.run(cut_off())

    async def use() -> Any:
        async with supervisor:
            return await supervisor.run(Task("work", 7))

    assert asyncio.run(use()) == 7


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("overflow", [None, "store"])
def test_a_run_whose_loop_ended_without_a_close_is_over(closes: bool, overflow: str | None, tmp_path: Path) -> None:  # noqa: FBT001
    supervisor = make_supervisor(echo_later, overflow=overflow and SqliteTaskStore(tmp_path / "spill.db"))

    async def use(number: int) -> Any:
        if closes:
            await supervisor.close()
        await supervisor.start()
        value = await supervisor.run(Task("work", number))
        assert supervisor.statistics().succeeded == 1
        if number == 2:
            await supervisor.close()
        return value

    assert [asyncio.run(use(number)) for number in range(3)] == [0, 1, 2]


def test_a_removal_that_was_cut_off_with_its_loop_is_no_obstacle() -> None:
    supervisor = make_supervisor(echo_later)
    supervisor.register_worker("other", handler=Agent(60.0), task_types=["other"])

    async def begin_to_remove() -> None:
        await supervisor.start()
        supervisor.submit_nowait(Task("other"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await supervisor.unregister_worker("other")  # it goes on in the background

    asyncio.run(begin_to_remove())

    async def remove() -> list[str]:
        async with supervisor, asyncio.timeout(5.0):
            await supervisor.unregister_worker("other")
            return list(supervisor.workers)

    assert asyncio.run(remove()) == ["worker"]


def test_a_nested_supervisor_whose_loop_ended_starts_again_too() -> None:
    below, above = make_supervisor(echo_later), BackpressureSupervisor()
    above.register_worker("below", handler=below, task_types=["work"])

    async def use(number: int) -> Any:
        await above.start()
        value = await above.run(Task("work", number))
        if number == 2:
            await above.close()
        return value

    assert [asyncio.run(use(number)) for number in range(3)] == [0, 1, 2]


def test_it_is_closed_on_its_own_loop() -> None:
    supervisor = make_supervisor(echo_later)
    with supervisor.portal() as portal:
        assert isinstance(asyncio.run(error_of_close(supervisor)), WrongLoop)
        assert portal.run(Task("work", 7)) == 7


async def error_of_close(supervisor: BackpressureSupervisor) -> BaseException:
    return await error_of(supervisor.close())


def test_it_may_be_closed_in_one_thread_and_started_in_another() -> None:
    supervisor = make_supervisor(UncancellableHandler(0.3), zombie_grace=0.2)
    closing_has_begun = threading.Event()

    async def run_and_close() -> None:
        await supervisor.start()
        flood(supervisor, "work", 1)
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(supervisor.close())
        await asyncio.sleep(0)
        closing_has_begun.set()
        await closing
        await asyncio.sleep(0.3)  # its handler ends in this loop, while the next run is under way in another

    thread = threading.Thread(target=asyncio.run, args=(run_and_close(),))
    thread.start()
    closing_has_begun.wait()

    async def use() -> TaskStatus:
        async with supervisor:
            ticket = await supervisor.submit(Task("work", 0.0, priority=Priority.HIGH))
            return (await ticket).status

    assert asyncio.run(use()) is TaskStatus.SUCCEEDED
    thread.join()
    assert supervisor.workers["worker"].current_tasks == 0


class Stuck(SqliteTaskStore):
    """A store that does not close, while it is told not to."""

    stuck = True

    async def close(self) -> None:
        if self.stuck:
            await asyncio.Event().wait()
        await super().close()


def test_a_store_whose_loop_ended_before_it_was_closed_opens_again(tmp_path: Path) -> None:
    store = Stuck(tmp_path / "spill.db")
    supervisor = make_supervisor(echo_later, overflow=store)

    async def use(number: int) -> Any:
        await supervisor.start()
        ended = await supervisor.run(Task("work", number, durable=True))
        closing = asyncio.ensure_future(supervisor.close())
        if not store.stuck:
            await closing
        return ended  # otherwise the loop ends before the close

    assert [asyncio.run(use(number)) for number in range(2)] == [0, 1]
    store.stuck = False
    assert asyncio.run(use(2)) == 2

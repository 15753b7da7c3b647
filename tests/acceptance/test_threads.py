"""Plain callables in threads, the portal, and handlers that block the loop: in real time, because threads use it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import pytest
from tests.support.task_plane import error_of

from forebay import BackpressureSupervisor, Overloaded, Task, TaskFailed, TaskStatus, Verdict, progress
from forebay.errors import LoopStopped, SupervisorClosed, UnknownTaskType, WouldDeadlock
from forebay.events import LoopStalled, TaskProgress

PATIENCE = 20.0  # seconds; nothing here takes as long


@pytest.fixture
async def supervisor() -> AsyncIterator[BackpressureSupervisor]:
    async with BackpressureSupervisor() as running:
        yield running


async def in_a_thread(function: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, function)


# --- plain callables -------------------------------------------------------------------------------------------------


async def test_a_plain_callable_runs_in_a_thread_and_does_not_block_the_loop(
    supervisor: BackpressureSupervisor,
) -> None:
    go_on = threading.Event()

    def handler(_: Task) -> str:
        assert go_on.wait(PATIENCE)
        return threading.current_thread().name

    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    ticket = await supervisor.submit(Task("work"))
    await asyncio.sleep(0)
    go_on.set()
    assert (await ticket).result.startswith("forebay-")


async def test_more_callables_run_at_once_than_asyncio_has_threads(supervisor: BackpressureSupervisor) -> None:
    together = threading.Barrier(50)

    def handler(_: Task) -> int:
        return together.wait(PATIENCE)

    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=50)
    tickets = [await supervisor.submit(Task("work")) for _ in range(50)]
    assert sorted([(await ticket).result for ticket in tickets]) == list(range(50))


async def test_a_thread_that_outlives_its_timeout_holds_its_slot_until_it_ends(
    supervisor: BackpressureSupervisor,
) -> None:
    go_on = threading.Event()
    worker = supervisor.register_worker("worker", handler=lambda _: go_on.wait(PATIENCE), task_types=["work"])
    first = await supervisor.submit(Task("work", timeout=0.01))
    second = await supervisor.submit(Task("work"))
    assert (await first).status is TaskStatus.TIMED_OUT
    assert worker.current_tasks == 1
    assert second.status is TaskStatus.WAITING
    go_on.set()
    assert (await second).success


async def test_a_cancelled_thread_holds_its_slot_until_it_ends(supervisor: BackpressureSupervisor) -> None:
    started, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def handler(_: Task) -> None:
        started.set()
        go_on.wait(PATIENCE)
        over.set()

    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"])
    ticket = await supervisor.submit(Task("work"))
    assert await in_a_thread(lambda: started.wait(PATIENCE))
    ticket.cancel()
    assert (await ticket).status is TaskStatus.CANCELLED
    assert worker.current_tasks == 1
    go_on.set()
    await supervisor.drain()
    assert over.is_set()
    assert worker.current_tasks == 0


async def test_progress_comes_from_a_thread_in_order(supervisor: BackpressureSupervisor) -> None:
    go_on = threading.Event()

    def handler(_: Task) -> None:
        go_on.wait(PATIENCE)
        for number in range(100):
            progress(number)

    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    ticket = await supervisor.submit(Task("work"))
    values = []
    async for event in ticket.events():
        if event.kind == "started":
            go_on.set()
        if isinstance(event, TaskProgress):
            values.append(event.value)
    assert values == list(range(100))


async def test_progress_that_nobody_listens_to_does_not_wake_the_loop(
    supervisor: BackpressureSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(_: Task) -> None:
        for number in range(100):
            progress(number)

    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    woken = []
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def call_soon_threadsafe(*arguments: Any, **how: Any) -> asyncio.Handle:
        woken.append(arguments)
        return wake(*arguments, **how)

    monkeypatch.setattr(loop, "call_soon_threadsafe", call_soon_threadsafe)
    assert (await supervisor.run(Task("work"))) is None
    assert len(woken) < 100  # the end of the thread wakes it


@pytest.mark.parametrize("listens_to", ["task", "supervisor"])
async def test_a_listener_that_comes_during_a_run_gets_the_later_progress(
    supervisor: BackpressureSupervisor, listens_to: str
) -> None:
    reported, go_on = threading.Event(), threading.Event()

    def handler(_: Task) -> None:
        progress("early")
        reported.set()
        go_on.wait(PATIENCE)
        progress("late")

    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    ticket = await supervisor.submit(Task("work"))
    await in_a_thread(lambda: reported.wait(PATIENCE))
    values: list[Any] = []
    if listens_to == "task":
        async for event in ticket.events():
            go_on.set()
            values += [event.value] if isinstance(event, TaskProgress) else []
    else:
        async with supervisor.events() as events:
            go_on.set()
            async for event in events:
                values += [event.value] if isinstance(event, TaskProgress) else []
                if event.kind == "finished":
                    break
    assert values == ["late"]


note: contextvars.ContextVar[str] = contextvars.ContextVar("note", default="blank")


async def test_threads_are_used_again_and_their_contexts_are_not(supervisor: BackpressureSupervisor) -> None:
    seen = []

    def handler(_: Task) -> str:
        seen.append(threading.get_ident())
        before = note.get()
        note.set("scribbled")
        return before

    supervisor.register_worker("worker", handler=handler, task_types=["work"])
    assert [await supervisor.run(Task("work")) for _ in range(20)] == ["blank"] * 20
    assert len(set(seen)) < 20


async def test_a_payload_does_not_live_on_in_an_idle_thread() -> None:
    class LargeObject:
        """A large object."""

    def count() -> int:
        gc.collect()
        return sum(isinstance(thing, LargeObject) for thing in gc.get_objects())

    async with BackpressureSupervisor(keep_results=0) as supervisor:
        supervisor.register_worker("worker", handler=lambda _: None, task_types=["work"])
        await supervisor.run(Task("work", LargeObject()))
        await supervisor.run(Task("work"))
        assert count() == 0


async def test_leaving_does_not_wait_for_a_thread_that_never_ends() -> None:
    go_on = threading.Event()
    async with asyncio.timeout(PATIENCE):
        supervisor = BackpressureSupervisor(zombie_grace=0.05)
        await supervisor.start()
        supervisor.register_worker("worker", handler=lambda _: go_on.wait(PATIENCE), task_types=["work"])
        ticket = await supervisor.submit(Task("work"))
        report = await supervisor.drain(timeout=0.01)
        await supervisor.close()
        assert report.orphans == (ticket.task_id,)
        assert (await ticket).status is TaskStatus.CANCELLED
    go_on.set()


# --- the portal ------------------------------------------------------------------------------------------------------


async def echo(task: Task) -> Any:
    if isinstance(task.payload, Exception):
        raise task.payload
    return task.payload


async def forever(_: Task) -> None:
    await asyncio.Event().wait()


def test_a_program_without_a_loop_uses_the_portal() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=echo, task_types=["work"])
    with supervisor.portal() as portal:
        assert portal.run(Task("work", 7)) == 7
        ticket = portal.submit(Task("work", 8, task_id="t8"))
        assert ticket
        assert (ticket.verdict, ticket.task_id) == (Verdict.ADMITTED, "t8")
        assert ticket.result().result == 8
        assert ticket.status is TaskStatus.SUCCEEDED
    with pytest.raises(SupervisorClosed):
        portal.run(Task("work"))


def test_leaving_the_portal_drains() -> None:
    ended = []

    async def slow(task: Task) -> None:
        await asyncio.sleep(0.05)
        ended.append(task.payload)

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=slow, task_types=["work"])
    with supervisor.portal() as portal:
        for number in range(3):
            portal.submit(Task("work", number))
    assert ended == [0, 1, 2]


def test_results_are_there_after_the_portal_has_closed() -> None:
    go_on = threading.Event()

    def waiting(task: Task) -> Any:
        go_on.wait(PATIENCE)
        return task.payload

    supervisor = BackpressureSupervisor(max_queue_size=0)
    supervisor.register_worker("worker", handler=waiting, task_types=["work"])
    with supervisor.portal() as portal:
        tickets = [portal.submit(Task("work", 1)), portal.submit(Task("work", 2))]
        go_on.set()
    assert tickets[0].result().result == 1
    assert tickets[0].result(timeout=0.0).result == 1
    assert not tickets[0].cancel()
    with pytest.raises(Overloaded):
        tickets[1].result()


def test_a_call_that_the_closing_loop_drops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.supervisor.portal._LOOP_CHECK_INTERVAL", 0.01)
    loop = asyncio.new_event_loop()
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=echo, task_types=["work"])
    loop.run_until_complete(supervisor.start())
    portal = supervisor.portal()
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", lambda work, _: work.close() or Future())
    threading.Timer(0.05, loop.close).start()
    with pytest.raises(SupervisorClosed):
        portal.run(Task("work"))


def test_a_loop_that_does_not_run_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.supervisor.portal._LOOP_CHECK_INTERVAL", 0.01)
    monkeypatch.setattr("forebay.supervisor.portal._MAX_LOOP_PAUSE", 0.05)
    loop = asyncio.new_event_loop()
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=echo, task_types=["work"])
    loop.run_until_complete(supervisor.start())
    with pytest.raises(LoopStopped, match=r"portal\.run\(\) waits"):
        supervisor.portal().run(Task("work"))
    loop.run_until_complete(supervisor.close())
    loop.close()


def test_leaving_the_portal_by_an_error_stops_the_handlers() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("worker", handler=forever, task_types=["work"])
    tickets = []

    def use() -> None:
        with supervisor.portal() as portal:
            tickets.append(portal.submit(Task("work")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert tickets[0].status is TaskStatus.CANCELLED


def test_the_portal_raises_what_run_and_submit_raise() -> None:
    supervisor = BackpressureSupervisor(max_queue_size=0)
    supervisor.register_worker("worker", handler=echo, task_types=["work"])
    supervisor.register_worker("stuck", handler=forever, task_types=["stuck"])
    with supervisor.portal() as portal:
        with pytest.raises(TaskFailed) as caught:
            portal.run(Task("work", ValueError("x")))
        assert isinstance(caught.value.__cause__, ValueError)
        with pytest.raises(UnknownTaskType):
            portal.submit(Task("wrok"))
        busy = portal.submit(Task("stuck"))
        rejected = portal.submit(Task("stuck"))
        assert not rejected
        with pytest.raises(Overloaded):
            rejected.result()
        with pytest.raises(TimeoutError):
            busy.result(timeout=0.01)
        assert busy.cancel()
        assert not busy.cancel()
        assert busy.result().status is TaskStatus.CANCELLED


def test_a_start_that_fails_is_raised_where_the_portal_was_entered() -> None:
    supervisor = BackpressureSupervisor(overflow="sqlite:////nowhere/at/all.db")
    with pytest.raises(Exception, match="mkdir"), supervisor.portal():
        pytest.fail("it was entered")


def test_a_portal_may_be_entered_again_and_so_may_another_one() -> None:
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("echo", handler=lambda task: task.payload, task_types=["echo"])
    portal = supervisor.portal()
    for each in (portal, portal, supervisor.portal()):
        with each:
            assert each.run(Task("echo", 7)) == 7
            assert supervisor.statistics().succeeded == 1
        with pytest.raises(SupervisorClosed):
            each.run(Task("echo", 7))


async def test_threads_reach_a_running_supervisor_by_its_portal(supervisor: BackpressureSupervisor) -> None:
    supervisor.register_worker("worker", handler=echo, task_types=["work"], max_concurrent=10)
    portal = supervisor.portal()
    jobs = [in_a_thread(lambda number=number: portal.run(Task("work", number))) for number in range(10)]  # type: ignore[misc]
    assert await asyncio.gather(*jobs) == list(range(10))


async def test_on_the_supervisors_own_loop_the_portal_says_that_it_would_wait_for_itself(
    supervisor: BackpressureSupervisor,
) -> None:
    supervisor.register_worker("worker", handler=echo, task_types=["work"])
    with pytest.raises(WouldDeadlock, match=r"await supervisor\.run"):
        supervisor.portal().run(Task("work"))


async def test_threads_that_hold_every_slot_and_run_nested_tasks_cannot_deadlock(
    supervisor: BackpressureSupervisor,
) -> None:
    portal = supervisor.portal()

    def handler(task: Task) -> int:
        return 1 + (portal.run(Task("work", task.payload - 1)) if task.payload else 0)

    worker = supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=2)
    async with asyncio.timeout(PATIENCE):
        tickets = [await supervisor.submit(Task("work", 5)) for _ in range(4)]
        assert [(await ticket).result for ticket in tickets] == [6] * 4
    await supervisor.drain()
    assert worker.current_tasks == 0


# --- handlers that block the loop ------------------------------------------------------------------------------------


def block(seconds: float) -> None:
    time.sleep(seconds)  # noqa: TID251 - the very thing


@pytest.mark.blocks
async def test_a_handler_that_blocks_the_loop_is_detected_and_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "forebay")
    stalls: list[Any] = []
    reported = asyncio.Event()

    def sink(event: Any) -> None:
        if isinstance(event, LoopStalled):
            stalls.append(event)
            reported.set()

    async def blocks(_: Task) -> str:
        await asyncio.sleep(0)
        block(0.8)
        await reported.wait()
        return "done"

    async with BackpressureSupervisor(lag_bound=0.1, on_event=sink) as supervisor:
        supervisor.register_worker("blocker", handler=blocks, task_types=["work"])
        async with asyncio.timeout(PATIENCE):
            ticket = await supervisor.submit(Task("work", "a secret", task_id="culprit"))
            assert (await ticket).success
        assert supervisor.statistics().stalls >= 1
    stall = stalls[0]
    assert (stall.task_id, stall.worker_id) == ("culprit", "blocker")
    assert 0.1 <= stall.seconds <= 5.0
    assert "in block" in stall.where
    (message,) = [record.getMessage() for record in caplog.records if "was blocked" in record.getMessage()][:1]
    assert "task 'culprit' on worker 'blocker'" in message
    assert "in block" in message
    assert "a secret" not in caplog.text


@pytest.mark.blocks
async def test_a_task_that_finishes_during_a_stall_is_not_timed_out_by_it() -> None:
    async with BackpressureSupervisor(lag_bound=None) as supervisor:

        async def waits(_: Task) -> str:
            await asyncio.sleep(0.05)
            return "in time"

        async def blocks(_: Task) -> None:
            await asyncio.sleep(0)
            block(0.4)

        supervisor.register_worker("worker", handler=waits, task_types=["work"], timeout=0.2)
        supervisor.register_worker("blocker", handler=blocks, task_types=["block"])
        ticket = await supervisor.submit(Task("work"))
        await supervisor.submit(Task("block"))
        assert (await ticket).result == "in time"


@pytest.mark.blocks
async def test_a_loop_that_stays_late_reads_as_a_load_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, asked = asyncio.get_running_loop(), threading.Event()
    ask = loop.call_soon_threadsafe

    def watched(*what: Any, **how: Any) -> asyncio.Handle:
        handle = ask(*what, **how)
        if threading.current_thread().name == "forebay-loop-monitor":
            asked.set()
        return handle

    monkeypatch.setattr(loop, "call_soon_threadsafe", watched)
    async with BackpressureSupervisor(lag_bound=0.01) as supervisor:
        supervisor.register_worker("worker", handler=echo, task_types=["work"])
        async with asyncio.timeout(PATIENCE):
            while supervisor.system_load() < 1.0:
                assert asked.wait(PATIENCE)  # in this loop: each of its turns is late, whatever else the host does
                asked.clear()
                block(0.02)
                await asyncio.sleep(0)
        assert supervisor.statistics().limited_by == "host"
        error = await error_of(supervisor.run(Task("work")))
    assert isinstance(error, Overloaded)
    assert error.limited_by == "host"


async def test_threads_that_are_cancelled_while_they_wait_through_the_portal_keep_new_runs_from_beginning() -> None:
    loop, go_on = asyncio.get_running_loop(), threading.Event()
    waiting, working = asyncio.Semaphore(0), asyncio.Semaphore(0)
    child_may_end = asyncio.Event()
    supervisor = BackpressureSupervisor()

    def parent(_: Task) -> None:
        portal.run(Task("child"))
        loop.call_soon_threadsafe(working.release)
        go_on.wait(PATIENCE)

    async def child(_: Task) -> None:
        waiting.release()
        await child_may_end.wait()

    supervisor.register_worker("parent", handler=parent, task_types=["parent"], max_concurrent=1)
    supervisor.register_worker("child", handler=child, task_types=["child"], max_concurrent=100)
    async with supervisor:
        portal = supervisor.portal()
        tickets = []
        for number in range(20):
            tickets.append(await supervisor.submit(Task("parent")))
            if number < 2:  # the bound of open runs; the others do not begin
                await waiting.acquire()
            tickets[-1].cancel()
        assert supervisor.workers["child"].current_tasks == 2
        child_may_end.set()
        for _ in range(2):
            await working.acquire()
        go_on.set()
        await supervisor.drain()
        assert working.locked()
        assert supervisor.workers["parent"].current_tasks == 0
